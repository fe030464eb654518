"""Trackio, which keeps runs in a file of this machine, has the target in the run's configuration."""

import json
import sqlite3

import pytest
import tiny
from training import make_trainer, warm_model

from trl_qtarget import QTargetSFTTrainer


@pytest.mark.slow
def test_trackio_is_told_the_target_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when the package is imported
    pytest.importorskip("trackio", reason="pip install trackio")
    options = {"report_to": "trackio", "project": "sums", "run_name": "first", "output_dir": str(tmp_path / "out")}
    make_trainer(
        QTargetSFTTrainer, tiny.prompt_dataset(), warm_model(), steps=2, options=options, qtarget_config="asft"
    ).train()
    (file,) = (tmp_path / "trackio").glob("sums*.db")
    with sqlite3.connect(file) as database:
        ((written,),) = database.execute("SELECT config FROM configs").fetchall()
        metrics = "".join(str(row) for row in database.execute("SELECT metrics FROM metrics"))
    told = json.loads(written)
    assert told["qtarget_method"] == "asft" and told["qtarget_lam"] == 0.05
    assert "target/nll" in metrics
