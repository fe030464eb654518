"""Result files: one line of JSON per run, appended as runs end, with what a number depends on."""

import datetime
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from benchmarks.common import machine_facts
from trl_qtarget.files import replacing

from .settings import Study


FILES = {"tune": "tuning.jsonl", "test": "test.jsonl"}
VERSIONS = ("torch", "trl", "transformers", "accelerate", "reasoning-gym", "trl-qtarget")


class Store:
    """The results of a study in a folder, by the key of the run.

    A line is written whole or, after an interruption, dropped when the file is opened for writing again. One process
    at a time may write: two would do every run twice, and one could drop the line that the other is writing.

    Args:
        versions: packages whose versions are recorded.

    Raises:
        ValueError: the folder holds results of other settings, or another process is writing into it.
    """

    def __init__(self, directory: Path, study: Study, writable: bool = True, versions: tuple[str, ...] = VERSIONS):
        self.directory = directory
        self._versions = versions
        self.results: dict[str, dict[str, Any]] = {}
        self.sessions: list[dict[str, Any]] = []
        if writable:
            self._lock()
        facts = directory / "facts.json"
        if facts.is_file():
            known = json.loads(facts.read_text(encoding="utf-8"))
            if known["fingerprint"] != study.fingerprint:
                raise ValueError(
                    f"`results`: {directory} holds results of other settings: choose an empty folder, or take the "
                    "settings back to what they were."
                )
            self.sessions = known["sessions"]
        for name in FILES.values():
            for result in self._read(directory / name, writable):
                self.results[result["key"]] = result
        self._check_methods(study)
        if writable:
            self._begin(facts, study)

    def _lock(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        # One object per process and path; the system gives the lock back however the process ends.
        self._held = FileLock(self.directory / ".lock", is_singleton=True)
        try:
            self._held.acquire(blocking=False)
        except Timeout:
            raise ValueError(
                f"`results`: a study is already writing into {self.directory}: let it end, or choose another folder."
            ) from None

    def _read(self, path: Path, writable: bool) -> list[dict[str, Any]]:
        if not path.is_file():
            return []
        text = path.read_text(encoding="utf-8")
        whole, _, rest = text.rpartition("\n")
        if rest and writable:
            os.truncate(path, len(whole.encode()) + (1 if whole else 0))
        return [json.loads(line) for line in whole.splitlines()]

    def _check_methods(self, study: Study) -> None:
        """A key has the name of a method and its target alone, not what else it says."""
        methods = {method.name: method for method in study.methods}
        for result in self.results.values():
            if (method := methods.get(result["method"])) is None:
                continue
            for name in ("replica", "top_k"):
                recorded, asked = result.get(name, 0), getattr(method, name)
                if recorded != asked:
                    raise ValueError(
                        f"`{name}={asked}` of `{method.name}`: {self.directory} holds runs of that name with "
                        f"{recorded}: give the method another name."
                    )

    @property
    def origin(self) -> str:
        """Machines, dates and versions of packages that the results were made with, all of them where these differ."""
        results = self.results.values()
        used = [self.sessions[number] for number in sorted({result["session"] for result in results})]
        machines = " and ".join(sorted({session["machine"] for session in used}))
        days = sorted(result["date"] for result in results)
        dates = " to ".join(dict.fromkeys((days[0], days[-1])))
        each = {name: dict.fromkeys(session["versions"][name] for session in used) for name in used[0]["versions"]}
        versions = ", ".join(f"{name} {' and '.join(values)}" for name, values in each.items())
        return f"{machines}, {dates}; {versions}"

    def _begin(self, facts: Path, study: Study) -> None:
        """What the runs from now on depend on; they refer to it by number."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        session = {
            "device": device,
            "machine": machine_facts(device)["machine"],
            "versions": {name: importlib.metadata.version(name) for name in self._versions},
        }
        if session not in self.sessions:
            self.sessions.append(session)
        self.session = self.sessions.index(session)
        known = {"fingerprint": study.fingerprint, "sessions": self.sessions}
        with replacing(facts) as whole:
            whole.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")

    def add(self, result: dict[str, Any]) -> None:
        """Append a result; it is on the disk when this returns."""
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        result = {**result, "session": self.session, "date": today}
        with (self.directory / FILES[result["phase"]]).open("a", encoding="utf-8") as file:
            file.write(json.dumps(result, separators=(",", ":")) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.results[result["key"]] = result

    def __contains__(self, key: str) -> bool:
        return key in self.results

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self.results[key]
