"""A studio on a folder, asked through Starlette's test client as a browser would ask it."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from sartor.studio import passwords
from sartor.studio.accounts import Role
from sartor.studio.studio_app import StudioApp

with warnings.catch_warnings():  # starlette 1.3 names an alias that anyio 4.16 deprecates
    warnings.simplefilter("ignore", DeprecationWarning)
    from starlette.testclient import TestClient

# a hash takes a millisecond here; test_accounts.py hashes at its full cost
passwords._ARGON2.update(iterations=1, lanes=1, memory_cost=1024)
ADDRESS = "http://127.0.0.1:8765"
PASSWORD = "four words are enough"
CSRF = re.compile(r'name=csrf value="([0-9a-f]{64})"')


class Site:
    """A studio with a client that has its cookies."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder = folder
        self.app = StudioApp(folder, **options)
        self.client = self.new_client()

    def new_client(self) -> TestClient:
        return TestClient(self.app, base_url=ADDRESS, raise_server_exceptions=False, follow_redirects=False)

    def log_in(self, role: Role = Role.OWNER, name: str = "ada") -> TestClient:
        """Make a user with this role and log the client in."""
        accounts = self.app.studio.accounts
        token = accounts.add_user(name, role)
        accounts.accept(token, name, PASSWORD)
        answer = self.post("/login", from_page="/login", name=name, password=PASSWORD, next="/")
        assert answer.status_code == 303, answer.text
        return self.client

    def page(self, path: str, status: int = 200, **headers: str) -> str:
        answer = self.client.get(path, headers=headers)
        assert answer.status_code == status, (
            f"{path}: {answer.status_code} {answer.headers.get('location', '')}\n{answer.text[:2000]}"
        )
        return answer.text

    def csrf(self, path: str) -> str:
        match = CSRF.search(self.client.get(path).text)
        assert match, path
        return match[1]

    def post(self, path: str, *, from_page: str, **fields: str | list[str]) -> Any:
        """Send a form of a page with the token that the page gave."""
        return self.client.post(path, data={"csrf": self.csrf(from_page), **fields}, headers={"origin": ADDRESS})

    def close(self) -> None:
        self.client.close()
        self.app.close()
