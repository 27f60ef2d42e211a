"""The converted Whisper beside the runtime that its file is made for, on clips whose words are known; and what a tower
costs.

    python benchmarks/whisper.py --json              # all clips of the asset prompts-en: 15 minutes on two cores
    python benchmarks/whisper.py --json --clips 40   # every so many, to look
    python benchmarks/whisper.py --json --small      # a tiny Whisper of random weights: shows that it runs

Both transcribe greedily, in fp32, from the same spectrograms. `wer` is over the clips in which something is spoken,
after Whisper's own normalisation of English. `encoder_ms`: of one clip of 2.5 s, by threads: as the tower does it, in
its window of 30 s, and in one that ends a while after the clip, with the positions cut. `short_windows` says of a few
clips what the words are then worth (a run-away repeats itself up to SHORT_TOKENS tokens), and how alike a feature is
to that of the whole window. Where CTranslate2 is not installed `absent` names it, and what compares with it is left
out.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.metadata
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ablation
import jiwer
import numpy as np
import parts
import smallest
import torch
from results import print_result
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

from sartor.core import assets
from sartor.media.audio import read_sound
from sartor.models import whisper_conversion
from sartor.models.loading import quiet_transformers
from sartor.models.towers import audio_towers
from sartor.models.towers.audio_towers import SpeechToText, open_speech_to_text

CLIP_S = 2.5
AFTER_S = (1.0, 2.0, 5.0)  # of a short window, behind the clip
SHORT_CLIPS = 40  # for the short windows
SHORT_TOKENS, START_TOKENS = 80, 2
REPEATS = 9
_normal = EnglishTextNormalizer({})


def clips() -> list[tuple[Path, str]]:
    """(recording, what is said in it) in the order of the asset's list; of what is not speech, what it is in
    brackets.
    """
    folder = assets.install("prompts-en") / "usr/share"
    listed = gzip.decompress((folder / "doc/asterisk-core-sounds-en/core-sounds-en.txt.gz").read_bytes()).decode()
    lines = (line.partition(":") for line in listed.splitlines() if ":" in line and not line.startswith(";"))
    named = (
        (folder / "asterisk/sounds/en_US_f_Allison" / f"{name.strip()}.wav", text.strip()) for name, _, text in lines
    )
    return [(file, text) for file, text in named if file.is_file()]


def wer(wanted: Sequence[str], said: Sequence[str]) -> float:
    """Word error rate over the clips in which something is spoken."""
    pairs = [
        (_normal(text), _normal(found)) for text, found in zip(wanted, said, strict=True) if not text.startswith("[")
    ]
    pairs = [pair for pair in pairs if pair[0]]
    return float(jiwer.wer([text for text, _ in pairs], [found for _, found in pairs]))


def by_original(speech: SpeechToText, sounds: Sequence[Any]) -> list[str]:
    """What CTranslate2 itself says, from the asset's own folder."""
    import ctranslate2  # an extra of the benchmarks alone

    folder = assets.install(whisper_conversion.NAME) / whisper_conversion.FOLDER
    model = ctranslate2.models.Whisper(
        str(folder), device="cpu", compute_type="float32", intra_threads=torch.get_num_threads()
    )
    most = speech.model.generation_config.max_length

    def said(piece: Any) -> str:
        heard = audio_towers.spectrogram(speech.prepare, [piece], torch.zeros(1)).numpy()
        prompt = [["<|startoftranscript|>", "<|notimestamps|>"]]
        found = model.generate(ctranslate2.StorageView.from_array(heard), prompt, beam_size=1, max_length=most)
        return str(speech.tokenizer.decode(found[0].sequences_ids[0], skip_special_tokens=True)).strip()

    pieces = [[said(piece) for piece in audio_towers.windows(sound, speech.prepare.n_samples)] for sound in sounds]
    return [" ".join(text for text in texts if text) for texts in pieces]


def short(encoder: Any, heard: Any) -> Any:
    """The encoder on a spectrogram that is shorter than its window."""
    x = torch.nn.functional.gelu(encoder.conv1(heard))
    x = torch.nn.functional.gelu(encoder.conv2(x)).transpose(1, 2)
    x = x + encoder.embed_positions.weight[: x.shape[1]]
    for layer in encoder.layers:
        x = layer(x, None)
    return encoder.layer_norm(x)


def cut(heard: Any, samples: int, after_s: float, prepare: Any) -> Any:
    """The spectrogram up to a while after the clip's end, an even number of frames."""
    frames = int(samples / prepare.hop_length + after_s * prepare.sampling_rate / prepare.hop_length)
    return heard[:, :, : min(frames + frames % 2, heard.shape[2])]


@torch.inference_mode()
def by_short_windows(speech: SpeechToText, sounds: Sequence[Any], after_s: float) -> tuple[list[str], float]:
    """What the same Whisper says when its windows end a while after the clips; how alike (cosine) its features are."""
    said, alike, encoder, prepare = [], [], speech.model.model.encoder, speech.prepare
    for sound in sounds:
        piece = sound[: prepare.n_samples]
        heard = audio_towers.spectrogram(prepare, [piece], encoder.conv1.weight)
        states = short(encoder, cut(heard, len(piece), after_s, prepare))
        features = -(-len(piece) // (prepare.hop_length * audio_towers.STRIDE))
        whole = encoder(heard).last_hidden_state[:, :features]
        alike.append(torch.nn.functional.cosine_similarity(whole, states[:, :features], dim=-1).mean())
        with quiet_transformers():
            tokens = speech.model.generate(
                encoder_outputs=BaseModelOutput(last_hidden_state=states),
                do_sample=False,
                num_beams=1,
                max_new_tokens=min(SHORT_TOKENS, speech.model.config.max_target_positions - START_TOKENS),
            )
        said.append(speech.tokenizer.decode(tokens[0], skip_special_tokens=True).strip())
    return said, float(torch.stack(alike).mean())


def encoder_ms(speech: SpeechToText) -> dict[str, Any]:
    """Milliseconds of the encoder for a clip of CLIP_S, medians of REPEATS, by threads and window."""
    encoder, prepare = speech.model.model.encoder, speech.prepare
    sound = np.random.default_rng(0).normal(0, 0.05, round(CLIP_S * speech.rate)).astype(np.float32)
    heard = audio_towers.spectrogram(prepare, [sound], encoder.conv1.weight)
    ways: dict[str, Callable[[], Any]] = {"30 s": lambda: encoder(heard)}
    for after_s in AFTER_S:
        ways[f"clip + {after_s:g} s"] = lambda after_s=after_s: short(
            encoder, cut(heard, len(sound), after_s, prepare)
        )
    ways["spectrogram"] = lambda: audio_towers.spectrogram(prepare, [sound], encoder.conv1.weight)
    threads, said = torch.get_num_threads(), {}
    for count in (1, 2):
        torch.set_num_threads(count)
        said[str(count)] = {name: round(1000 * statistics.median(timed(way)), 1) for name, way in ways.items()}
    torch.set_num_threads(threads)
    return said


@torch.inference_mode()
def timed(way: Callable[[], Any]) -> Iterator[float]:
    """Seconds of each of REPEATS, after one that is not counted."""
    way()
    for _ in range(REPEATS):
        began = time.perf_counter()
        way()
        yield time.perf_counter() - began


def clocked(transcribe: Callable[[], Sequence[str]]) -> tuple[list[str], float]:
    """Texts, and the seconds that they took."""
    began = time.perf_counter()
    return list(transcribe()), time.perf_counter() - began


def absent(is_small: bool) -> dict[str, str]:
    """Why the original is not compared with; empty if it is."""
    if is_small:
        return {"ctranslate2": smallest.LEFT_OUT}
    if importlib.util.find_spec("ctranslate2") is None:
        return {"ctranslate2": "not installed: pip install ctranslate2 (or 'sartor[bench]')"}
    return {}


def measure(most: int, *, with_short: bool, missing: dict[str, str]) -> dict[str, Any]:
    """Everything that is printed."""
    found = clips()
    found = found[:: max(1, len(found) // most)] if most else found
    speech = open_speech_to_text(whisper_conversion.NAME, torch.device("cpu"))
    wanted, sounds = [text for _, text in found], [read_sound(file, speech.rate) for file, _ in found]
    said: dict[str, Any] = {
        "machine": ablation.machine(),
        "encoder_ms": parts.run("encoder", lambda: encoder_ms(speech)),
    }
    ours, our_s = parts.run("ours", lambda: clocked(lambda: speech.transcribe(sounds)))
    said |= {
        "clips": len(found),
        "seconds": round(sum(map(len, sounds)) / speech.rate, 1),
        "wer": wer(wanted, ours),
        "wall_s": {"ours": round(our_s, 1)},
        "versions": {name: importlib.metadata.version(name) for name in ("transformers", "soxr", "jiwer")},
        "absent": missing,
    }
    if not missing:
        theirs, their_s = parts.run("the original", lambda: clocked(lambda: by_original(speech, sounds)))
        said["equal"] = sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(found)
        said["unequal"] = [file.stem for (file, _), a, b in zip(found, ours, theirs, strict=True) if a != b]
        said["wer_original"] = wer(wanted, theirs)
        said["wall_s"]["original"] = round(their_s, 1)
        said["versions"]["ctranslate2"] = importlib.metadata.version("ctranslate2")
    if with_short:
        few = slice(None, None, max(1, len(found) // SHORT_CLIPS))
        said["short_windows"] = {"clips": len(wanted[few]), "30 s": {"wer": wer(wanted[few], ours[few]), "alike": 1.0}}
        for after_s in AFTER_S:
            texts, alike = parts.run(
                f"windows of clip + {after_s:g} s",
                lambda after_s=after_s: by_short_windows(speech, sounds[few], after_s),
            )
            said["short_windows"][f"clip + {after_s:g} s"] = {"wer": wer(wanted[few], texts), "alike": alike}
    return said


def main() -> None:
    """Print JSON on the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    smallest.add_argument(parser)
    parser.add_argument("--clips", type=int, default=0, help="about so many; 0 is all")
    parser.add_argument("--no-short", action="store_true", help="leave the short windows out")
    parser.add_argument("--json", action="store_true", help="on one line")
    asked = parser.parse_args()
    with smallest.home(asked.small, "prompts-en", whisper_conversion.NAME):
        said = measure(asked.clips, with_short=not asked.no_short, missing=absent(asked.small))
    print_result(said, indent=None if asked.json else 1)


if __name__ == "__main__":
    main()
