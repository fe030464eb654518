"""The run pack for a GPU: what travels is whole on the other side, a sitting can be broken off, its commands exist."""

import importlib
import json
import zipfile

import pytest
import torch

from benchmarks.common import read_results
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import install, launches, pack, paper
from benchmarks.gpu.parts import PARTS, Part


def test_a_wheel_that_was_cut_is_put_together_when_all_of_it_is_here(tmp_path):
    wheel = tmp_path / "model-1.0-py3-none-any.whl"
    wheel.write_bytes(bytes(range(250)) * 3 + b"end")
    first, second = tmp_path / "pack" / "2", tmp_path / "pack" / "3"
    pack.split(wheel, [first, second])
    aside = tmp_path / "aside"
    second.rename(aside)
    joined = tmp_path / "joined"
    assert install.join(tmp_path / "pack", joined) == [f"{wheel.name}: 1 of 2 parts are here"] and not joined.exists()
    aside.rename(second)
    assert install.join(tmp_path / "pack", joined) == []
    assert (joined / wheel.name).read_bytes() == wheel.read_bytes()
    (part,) = second.glob("*.part1")
    part.write_bytes(part.read_bytes()[:-1] + b"!")
    assert install.join(tmp_path / "pack", joined) == [f"{wheel.name}: its parts do not make the whole"]


def test_of_bitsandbytes_one_library_is_kept(tmp_path):
    wheel = tmp_path / "bitsandbytes-1.0-py3-none-any.whl"
    others = ["bitsandbytes/__init__.py", "bitsandbytes-1.0.dist-info/RECORD"]
    libraries = [f"bitsandbytes/libbitsandbytes_{name}.so" for name in ("cuda124", "cuda130", "rocm70", "cpu")]
    with zipfile.ZipFile(wheel, "w") as file:
        for name in (*libraries, *others):
            file.writestr(name, name)
    with pytest.raises(SystemExit, match=r"--cuda 99: .* has no library for it"):
        pack.thinned(wheel, "99")
    pack.thinned(wheel, "130")
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        recorded = [line.split(",")[0] for line in file.read(others[1]).decode().splitlines()]
    assert set(names) == set(recorded) == {*libraries[1::2], *others}


@pytest.fixture
def sitting(tmp_path, monkeypatch):
    """A sitting with parts of its own; the second has no time on its first try, the third cannot run."""
    parts = (
        Part("first", 30, "prints", """-c "print('here')" """),
        Part("long", 30, "waits", '-c "while True: pass"'),
        Part("absent", 30, "needs more", "-c pass", lacks=lambda: "a library is not installed"),
        Part("wrong", 30, "fails", "-c 1/0"),
    )
    monkeypatch.setattr(command, "PARTS", parts)
    monkeypatch.setattr(command, "BY_NAME", {part.name: part for part in parts})
    monkeypatch.setattr(command, "_LEAST", 0)
    monkeypatch.setattr(install, "install", lambda: ["nothing has arrived"])
    monkeypatch.setattr(install, "facts", lambda: {"versions": {"torch": "0.0"}, "refused": {}, "gpu": None})
    monkeypatch.setattr(install, "unmet", list)

    def sit(name: str, *options: str) -> int:
        folders = ["--output_dir", str(tmp_path / name), "--keep", str(tmp_path / "kept")]
        return command.main(["--toy", *folders, *options])

    return sit


def test_a_second_sitting_goes_on_where_the_first_ended(sitting, tmp_path, monkeypatch, capsys):
    run = command._run
    order = []

    def shortened(part, seconds, *rest):
        order.append(part.name)
        return run(part, 0.5 if part.name == "long" else seconds, *rest)

    monkeypatch.setattr(command, "_run", shortened)
    assert sitting("one", "--parts", "first", "long") == 0
    state = json.loads((tmp_path / "one" / "state.json").read_text())["parts"]
    assert {name: part["how"] for name, part in state.items()} == {
        "first": "done",
        "long": "stopped, its time was over",
    }
    assert "here" in (tmp_path / "one" / "log.txt").read_text()

    # Another folder, as on another machine to which what was kept has been brought.
    assert sitting("two") == 1
    assert order == ["first", "long", "wrong", "long"]
    report = (tmp_path / "two" / "report.md").read_text()
    assert "**first**: done" in report and "left out: a library is not installed" in report
    assert "ZeroDivisionError" in report and "note: nothing has arrived" in report and "torch 0.0" in report
    assert "ZeroDivisionError" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"state.json", "report.md", "log.txt"}


def test_without_a_gpu_there_is_only_a_rehearsal(tmp_path, sitting, capsys):
    folders = ["--output_dir", str(tmp_path / "one"), "--keep", str(tmp_path / "kept")]
    assert command.main(folders) == 1 and "`--toy` rehearses without one" in capsys.readouterr().out


@pytest.mark.parametrize("part", [part for part in PARTS if part.budgeted], ids=lambda part: part.name)
def test_commands_are_accepted_and_keep_to_their_budget(part, tmp_path, capsys):
    """Also those of a GPU: without any time left, they are only read."""
    _, _, module, *words = part.arguments(False, "cpu", str(tmp_path), 0)
    # On a CPU, some providers are an error where they are named.
    words = [word for word in words if not word.startswith("qtarget-torch/")]
    words[words.index("--budget") + 1] = "1e-9"
    importlib.import_module(module).main(words)
    assert "is left out: the time budget is spent." in capsys.readouterr().out
    assert not any(read_results(path) for path in tmp_path.iterdir())


def test_all_fits_into_a_sitting():
    assert sum(part.seconds for part in PARTS) <= 25 * 60
    assert all(part.seconds < 600 for part in PARTS)


def test_launches_are_counted_without_views():
    with launches.Launches() as counter:
        (torch.ones(4, 3)[1:].t() * 2)[::2].add_(1)
    assert counter.counts == {"ones": 1, "mul": 1, "add_": 1} | ({"fill_": 1} if counter.counts["fill_"] else {})


def test_the_page_says_what_the_model_says():
    page = paper.PAGE.read_text()
    assert paper.replaced(page, paper.text()) == page, "python -m benchmarks.gpu.paper --write"
    with pytest.raises(ValueError, match="must have a section between"):
        paper.replaced("# A page without it", "")


def test_measured_times_stand_beside_the_predictions(tmp_path):
    assert "1.289, – |" in paper.pieces_table(paper.Call(paper.SHAPES[0]), tmp_path)
    call = paper.Call(paper.SHAPES[0])
    row = {"provider": "piece/logits", "mode": "dft", "N": call.tokens, "H": 4096, "V": 151936, "median": 0.0015}
    row |= {"machine": "NVIDIA H200", "date": "2026-01-01"}
    (tmp_path / "pieces-cuda.csv").write_text(f"{','.join(row)}\n{','.join(map(str, row.values()))}\n")
    assert "| 1.289, – | 1.289, 1.50 |" in paper.pieces_table(call, tmp_path)


def test_on_paper_a_larger_chunk_moves_less_and_no_piece_beats_the_peaks():
    for reference in (False, True):
        small, large = (paper.Call(paper.SHAPES[0], reference, chunk_bytes=size << 20) for size in (128, 1024))
        for gpu in paper.GPUS:
            assert large.seconds(gpu, 56) < small.seconds(gpu, 56)
            assert large.seconds(gpu, 0) > large.floor(gpu)
