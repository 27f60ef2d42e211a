from __future__ import annotations

import threading
from pathlib import Path

import pytest
from sqlalchemy import BigInteger, Column, MetaData, Table, insert, select, update

from sartor.core import database
from sartor.core.database import Form, open_database
from sartor.core.errors import ArtifactError, BusyError, ConfigError
from sartor.core.row_seals import RowSeals

NOTES = Table("notes", MetaData(), Column("number", BigInteger, primary_key=True, autoincrement=False))
ENV = "from sartor.core.database import run_revisions\nrun_revisions()\n"
FORM = Form("shelf of notes", "shelf: ", Path("/nowhere"), NOTES.c.number)


@pytest.fixture
def form(tmp_path: Path) -> Form:
    (tmp_path / "migrations" / "versions").mkdir(parents=True)
    (tmp_path / "migrations" / "env.py").write_text(ENV)
    (tmp_path / "migrations" / "versions" / "r1.py").write_text(
        "import sqlalchemy as sa\nfrom alembic import op\nrevision, down_revision = '1', None\n"
        "def upgrade():\n    made = op.create_table('notes', sa.Column('number', sa.Integer, primary_key=True))\n"
        "    op.bulk_insert(made, [{'number': 0}])\n"
    )
    return Form("shelf of notes", "shelf: ", tmp_path / "migrations", NOTES.c.number, "notes_version")


def test_password_is_read_from_environment_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A URL that spells out a password is refused; errors show ${DB_PASSWORD} instead of its value."""
    with pytest.raises(ConfigError, match="spells out") as caught:
        database.open_database("postgresql+psycopg://team:hunter2@localhost/db", FORM)
    assert "hunter2" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"\$\{DB_PASSWORD\}, which is not set"):
        database.open_database("postgresql+psycopg://team:${DB_PASSWORD}@localhost/db", FORM)
    monkeypatch.setenv("DB_PASSWORD", "hunter2")
    url, secrets, name = database._filled("postgresql+psycopg://team:${DB_PASSWORD}@localhost/db", FORM)
    assert url.password == "hunter2" and "hunter2" not in name and "${DB_PASSWORD}" in name
    fault = database.Database(database.make_url("sqlite:////tmp/x"), secrets, name, FORM)._fault(
        Exception("bad password hunter2")
    )
    assert "hunter2" not in fault.problem and "${DB_PASSWORD}" in fault.problem


def test_unsupported_database_url_error_uses_form_wording() -> None:
    """In-memory SQLite, MySQL and text that is no URL are refused; the remedy begins with the form's key."""
    for url, said in (
        ("sqlite://", "a shelf of notes in memory"),
        ("mysql://host/db", "neither SQLite"),
        ("::", "URL of the shelf"),
    ):
        with pytest.raises(ConfigError, match=said) as caught:
            open_database(url, FORM)
        assert caught.value.remedy.startswith("shelf: ")


def test_concurrent_changes_serialize_and_failures_roll_back(
    form: Form, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads with 20 increments each reach exactly 40; a change that raises inserts nothing."""
    monkeypatch.setattr(database, "SYNCHRONOUS", "off")  # on a slow disk one of two writers waits for long
    monkeypatch.setattr(database, "BUSY_S", 120.0)
    opened = [open_database(f"sqlite:///{tmp_path}/notes.sqlite", form) for _ in range(2)]

    def rise(one: database.Database) -> None:
        for _ in range(20):
            with one.change() as connection:
                number = connection.execute(select(NOTES.c.number)).scalar_one()
                connection.execute(update(NOTES).values(number=number + 1))

    threads = [threading.Thread(target=rise, args=(one,)) for one in opened]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with pytest.raises(RuntimeError), opened[0].change() as connection:
        connection.execute(insert(NOTES).values(number=99))
        raise RuntimeError
    with opened[1].read() as connection:
        assert connection.execute(select(NOTES.c.number)).scalars().all() == [40]
    for one in opened:
        one.close()


def test_a_file_that_another_process_is_opening_is_told_as_busy(
    form: Form, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "OPEN_S", 0.05)
    with (
        database.FileLock(f"{tmp_path}/notes.sqlite.lock", is_singleton=False),
        pytest.raises(BusyError, match="opening"),
    ):
        open_database(f"sqlite:///{tmp_path}/notes.sqlite", form)


def test_a_form_of_a_newer_sartor_is_refused(form: Form, tmp_path: Path) -> None:
    opened = open_database(f"sqlite:///{tmp_path}/notes.sqlite", form)
    with opened.change() as connection:
        connection.exec_driver_sql("update notes_version set version_num = '9'")
    with pytest.raises(ArtifactError, match="shelf of notes .* the form '9'"):
        open_database(f"sqlite:///{tmp_path}/notes.sqlite", form)


def test_a_row_that_was_changed_from_outside_is_known() -> None:
    for seals in (RowSeals(), RowSeals(b"k" * 32)):
        row = seals.sealed({"id": "a", "number": 1})
        assert seals.is_whole(row) and not seals.is_whole({**row, "number": 2})
        assert not seals.is_whole({**row, "id": b"a"})
