"""Training loop of GRPO: groups of replies, of which a verifier's rewards make some likelier.

    prompt --sample G--> replies --verifier--> rewards --group mean--> advantages --one update--> weights

The Dataset's own replies are references for the verifier and never learnt. The reference of the divergence is the
model before its first update: the untouched base, whose modules are copied around the same tensors, as a teacher's
are, with the adapter of `method.start` if there is one.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path as Folder
from typing import Any

import torch

from sartor.core.errors import ConfigError, ModelError, SourceError
from sartor.core.reply_markup import without_reasoning
from sartor.core.row_warnings import DataWarning
from sartor.inference.engine import Sampling
from sartor.inference.verifiers.submission import Submission, Verifier
from sartor.inference.verifiers.verifier_check import VerifierCheck, check_rows, check_verifier
from sartor.models import adapters
from sartor.models.base import Base
from sartor.models.chat import ChatTokenizer
from sartor.models.losses.loss_backend import LossBackend, LossOptions
from sartor.models.packing import TokenizedExample
from sartor.tune import objectives
from sartor.tune.checkpoint_selection import last_reply
from sartor.tune.distil_teachers import shared_copy
from sartor.tune.distillation import distil_rows
from sartor.tune.model_setup import start_of
from sartor.tune.recipe import Grpo, ResolvedRecipe
from sartor.tune.reply_sampling import sample_replies, update_seed
from sartor.tune.tokenized_dataset import DistilExample, TokenizedDataset
from sartor.tune.training_loop import TrainingRun

Notice = Callable[[str], object]
# Updates in a row from which nothing can be learnt, after which a run ends
SILENT_UPDATES = 5
# Fewest rows by which a verifier is checked, if there are so many: half of LEAST_REPLIES, and some have no edit
_CHECKED_ROWS = 32
_NAMED = 3
# Rise of the loss of the held-out rows' own replies, in nats per token, from which a rising reward is doubted; as much
# forgetting is refused by the gate
DOUBTFUL_RISE = 0.5


@dataclass
class StartReference:
    """Model before its first update, beside the one that is tuned and around the same tensors of the base."""

    base: Base
    model: Any
    _backend: LossBackend | None = field(default=None, repr=False)

    @torch.no_grad()
    def log_probabilities(self, rows: Sequence[TokenizedExample]) -> torch.Tensor:
        """Return (S,) log-probabilities of the supervised tokens of rows, in order."""
        if self._backend is None:
            self._backend = self.base.path(self.model, rows, LossOptions(share=False))
        losses, _ = self._backend.losses(rows)
        return -losses


@dataclass(frozen=True)
class GrpoSetup:
    """What a run needs beside its rows. reference: the model before its first update, for the divergence and the loss
    of the held-out rows' own replies then; None if nothing is held out and `beta` is 0.
    """

    verifier: Verifier
    check: VerifierCheck
    reference: StartReference | None
    notice: Notice


def open_grpo(recipe: ResolvedRecipe, base: Base, data: TokenizedDataset, notice: Notice) -> GrpoSetup | None:
    """Return the checked verifier and the reference of a recipe; None if its objective is not grpo.

    Call it before the adapter is injected. Raises ConfigError for a base that reads media, SourceError for rows
    without a prompt, and what `check_verifier` raises.
    """
    objective = recipe.objective
    if not isinstance(objective, Grpo):
        return None
    if base.media is not None:
        raise ConfigError(f"{base.ref.name} reads media, and grpo reads text alone", "objective: {kind: sft}")
    rows, held_out = distil_rows(data.train), distil_rows(data.held_out)
    promptless = [row.example_id for row in [*rows, *held_out] if not last_reply(row)[0]]
    if promptless:
        raise SourceError(
            f"{len(promptless):,} rows are documents without a prompt to reply to, the first is {promptless[0]}",
            "leave their source out of the curation recipe, or objective: {kind: sft}",
        )
    verifier = objective.verifier
    submissions = [_submission(row) for row in [*held_out, *rows]]
    check_rows(verifier, submissions)
    checked = submissions[: max(_CHECKED_ROWS, len(held_out))]
    if len(checked) > len(held_out):
        notice(
            f"{len(held_out)} rows are held out: the verifier is checked by {len(checked) - len(held_out)} training "
            "rows besides, whose replies are not learnt"
        )
    check = check_verifier(verifier, checked, recipe.seed)
    notice(str(check))
    reference = None
    if objective.beta or held_out:
        start, model = start_of(recipe, base), shared_copy(base.model)
        model = adapters.open_adapter(model, start.path).requires_grad_(False) if start else model
        reference = StartReference(base, model)
    return GrpoSetup(verifier, check, reference, notice)


def _submission(row: DistilExample) -> Submission:
    """Return a row's own reply for a verifier."""
    assert row.example is not None
    return Submission.of_example(row.example)


@dataclass(frozen=True)
class GroupCounts:
    """Groups of a run so far.

    equal: groups whose rewards were all equal, from which nothing was learnt.
    silent_updates: updates in a row, up to the last, whose groups were all equal and not all fully rewarded.
    first_reward, last_reward: mean rewards of the first and the last update; -1 before the first.
    """

    groups: int = 0
    equal: int = 0
    silent_updates: int = 0
    first_reward: float = -1.0
    last_reward: float = -1.0


class GrpoRun(TrainingRun):
    """TrainingRun for GRPO.

    An update's loss is the weighted mean of `objectives.grpo` over the tokens of the replies whose group's rewards
    differ, plus `plain_weight` times the sft loss of rehearsal.
    """

    setup: GrpoSetup
    counts = GroupCounts()
    # of the update that is computed; they become `counts` once it is made
    next_counts = GroupCounts()
    held_out_reward: float | None = None
    # of the held-out rows' own replies, in nats per token: at the last evaluation, and before the first update
    reference_loss: float | None = None
    reference_loss_at_start: float | None = None

    @property
    def _objective(self) -> Grpo:
        assert isinstance(self.recipe.objective, Grpo)
        return self.recipe.objective

    @property
    def _chat(self) -> ChatTokenizer:
        chat = getattr(self.base, "chat", None)
        assert isinstance(chat, ChatTokenizer)
        return chat

    def verifier_facts(self) -> dict[str, Any]:
        """Return the facts about the verifier and its rewards for the manifest."""
        counts = self.counts
        return {
            **self.setup.check.as_json(),
            "groups": counts.groups,
            "equal_groups": counts.equal,
            "reward": {
                "first": counts.first_reward,
                "last": counts.last_reward,
                "held_out": self.held_out_reward,
            },
            "reference_loss": {"start": self.reference_loss_at_start, "last": self.reference_loss},
        }

    def silence(self) -> DataWarning | None:
        """Return a warning if no update could learn anything: fewer than SILENT_UPDATES, or all fully rewarded."""
        counts = self.counts
        if not counts.groups or counts.equal < counts.groups:
            return None
        problem = (
            f"in all {self.counters.updates} updates the replies to each prompt had the same reward, at last "
            f"{counts.last_reward:g}: nothing was learnt from them"
        )
        if counts.last_reward == 1:
            return DataWarning("equal_rewards", problem, "none is needed if every reply is right; else harder rows")
        return DataWarning("equal_rewards", problem, _remedy(counts.last_reward, self._objective))

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return the state of the TrainingRun with the counts of groups."""
        tensors, facts = super().state()
        own = {
            "groups": asdict(self.counts),
            "held_out_reward": self.held_out_reward,
            "reference_loss": self.reference_loss,
            "reference_loss_at_start": self.reference_loss_at_start,
        }
        return tensors, {**facts, **own}

    def _load_state(self, tensors: dict[str, torch.Tensor], facts: dict[str, Any], source: Folder) -> None:
        super()._load_state(tensors, facts, source)
        self.counts, self.held_out_reward = GroupCounts(**facts["groups"]), facts["held_out_reward"]
        self.reference_loss = facts.get("reference_loss")  # older checkpoints have neither
        self.reference_loss_at_start = facts.get("reference_loss_at_start")

    def _backward(self, rows: Sequence[TokenizedExample], weight: float = 1.0) -> float:
        """Return the loss of an update and add its gradients: groups of replies are sampled, rewarded and learnt.

        A group whose rewards are all equal teaches nothing. Rows of rehearsal are learnt by cross-entropy.
        """
        own, plain_rows = distil_rows(rows), [row for row in rows if not isinstance(row, DistilExample)]
        loss = super()._backward(plain_rows, weight * self._objective.plain_weight) if plain_rows else 0.0
        replies, rewards = self._rewarded_replies(own)
        advantages = dict(zip(map(id, replies), objectives.group_advantages(rewards).flatten().tolist(), strict=True))
        is_equal = rewards.amax(1) == rewards.amin(1)
        self.next_counts = self._counted(own, rewards, is_equal)
        size = self._objective.group_size
        learnt = [reply for index, reply in enumerate(replies) if not is_equal[index // size]]
        total = sum(reply.weight * reply.supervised_tokens for reply in learnt) or 1.0
        divergence = 0.0
        for micro in self._cut(learnt) if learnt else []:
            losses, weights = self.path.losses(micro)
            policy, reference = -losses, None
            if self._objective.beta and self.setup.reference is not None:
                reference = self.setup.reference.log_probabilities(micro)
                divergence += float(objectives.kl_estimate(policy.detach(), reference).sum())
            per_token = [advantages[id(reply)] for reply in micro for _ in range(reply.supervised_tokens)]
            values = objectives.grpo(
                policy,
                policy.detach(),
                reference,
                torch.tensor(per_token, device=policy.device),
                beta=self._objective.beta,
            )
            objective = weight * objectives.sft(values, weights, total)
            self.scaler.scale(objective).backward()
            loss += float(objective.detach())
        if not learnt and not plain_rows:
            for parameter in self.parameters:  # a gradient of 0, so that the scaler and AdamW have one
                parameter.grad = torch.zeros_like(parameter)
        tokens = [reply.supervised_tokens for reply in replies]
        self.objective_facts = {
            "reward": round(float(rewards.mean()), 6),
            "groups": len(own),
            "equal_groups": int(is_equal.sum()),
            "reply_tokens": round(statistics.fmean(tokens), 1),
            "divergence": divergence / max(sum(reply.supervised_tokens for reply in learnt), 1),
        }
        return loss

    def _rewarded_replies(self, rows: Sequence[DistilExample]) -> tuple[list[DistilExample], torch.Tensor]:
        """Return the replies to P prompts, a group after the other, and their rewards (P, G)."""
        objective = self._objective
        repeated = [row for row in rows for _ in range(objective.group_size)]
        sampling = Sampling(
            objective.max_reply_tokens,
            temperature=objective.temperature,
            seed=update_seed(self.recipe.seed, self.counters.updates),
        )
        replies = sample_replies(self.model, self._chat, repeated, sampling)
        submissions = [self._sampled(row, reply) for row, reply in zip(repeated, replies, strict=True)]
        rewards = torch.tensor(self.setup.verifier.rewards(submissions), dtype=torch.float64)
        return replies, rewards.view(len(rows), objective.group_size)

    def _sampled(self, row: DistilExample, reply: DistilExample) -> Submission:
        """Return a sampled reply to a row's prompt for a verifier, without its reasoning: references have none."""
        assert reply.example is not None
        is_opened = self._chat.opens_reasoning(last_reply(row)[0])
        answer = without_reasoning(reply.example.reply, is_opened=is_opened)
        return replace(_submission(row), reply=answer)

    def _counted(self, rows: Sequence[DistilExample], rewards: torch.Tensor, is_equal: torch.Tensor) -> GroupCounts:
        """Return the counts after this update. Raises ModelError once SILENT_UPDATES in a row taught nothing."""
        is_silent = bool(is_equal.all()) and float(rewards.min()) < 1
        silent = self.counts.silent_updates + 1 if is_silent else 0
        mean = round(float(rewards.mean()), 6)
        if silent >= SILENT_UPDATES:
            named = ", ".join(
                f"{row.example_id} ({float(group[0]):g})" for row, group in zip(rows[:_NAMED], rewards, strict=False)
            )
            raise ModelError(
                f"in {silent} updates, up to update {self.counters.updates + 1}, all replies to each prompt had the "
                f"same reward, so that nothing can be learnt; the state before it is saved in {self.saver.folder}; "
                f"rows and rewards: {named}",
                _remedy(mean, self._objective),
            )
        counts = self.counts
        return GroupCounts(
            groups=counts.groups + len(rows),
            equal=counts.equal + int(is_equal.sum()),
            silent_updates=silent,
            first_reward=mean if counts.first_reward < 0 else counts.first_reward,
            last_reward=mean,
        )

    def _record_update(self, rows: Sequence[TokenizedExample], *arguments: Any, **keywords: Any) -> None:
        super()._record_update(rows, *arguments, **keywords)
        self.counts = self.next_counts

    def _loss_of(self, rows: Sequence[TokenizedExample]) -> tuple[float, dict[str, float]]:
        """Return 1 minus the mean reward of greedy replies to the held-out rows, that reward, and the rows' own loss.

        A model that found a reply which the verifier takes for every prompt has full rewards; that the rows' own
        replies become unlikely tells it apart from one that learnt.
        """
        own = distil_rows(rows)
        self.reference_loss = super()._loss_of(own)[0]
        if self.reference_loss_at_start is None and self.setup.reference is not None:
            at_start = [self.setup.reference.log_probabilities(micro) for micro in self._cut(own)]
            self.reference_loss_at_start = -float(torch.cat(at_start).mean())
        sampling = Sampling(self._objective.max_reply_tokens, temperature=0.0)
        replies = sample_replies(self.model, self._chat, own, sampling)
        submissions = [self._sampled(row, reply) for row, reply in zip(own, replies, strict=True)]
        self.held_out_reward = round(statistics.fmean(self.setup.verifier.rewards(submissions)), 6)
        if (start := self.reference_loss_at_start) is not None and self.reference_loss > start + DOUBTFUL_RISE:
            self.setup.notice(
                f"warning: the reward of held-out rows is {self.held_out_reward:.2f}, and their own replies became "
                f"unlikely (from {start:.2f} to {self.reference_loss:.2f} nats per token): the model may have found "
                "what the verifier takes, and not what the prompts ask for. Read some replies; try a larger "
                "objective.beta, fewer updates, or a verifier that compares with the row's reply (json_fields)"
            )
        facts = {"eval_reward": self.held_out_reward, "reference_loss": self.reference_loss}
        return 1 - self.held_out_reward, facts


def _remedy(mean_reward: float, objective: Grpo) -> str:
    """Return what to do about groups of equal rewards, by the mean reward of the last update."""
    if not mean_reward:
        return (
            "no reply is rewarded: tune by sft on some right replies first and go on from there (method.start); if "
            f"they are cut before their end: --objective.max_reply_tokens {2 * objective.max_reply_tokens}; then "
            "start over with --replace"
        )
    return (
        f"--objective.temperature {objective.temperature + 0.3:.1f}, or --objective.group_size "
        f"{2 * objective.group_size}, so that replies differ; or harder rows; then start over with --replace"
    )
