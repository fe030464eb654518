"""Quiet runs of one thread: no progress bars, and of the libraries' logs only what a test asks for."""

import gc
import logging
import os
import shutil

import torch


# Read when Triton is first imported, which other libraries do: without a GPU its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Nothing here comes from a hub: without a network, each of the libraries' looks at it would wait for most of a minute.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import kernels_on
import pytest
import transformers
from nodes import two_nodes
from training import REFUSES_AUX_LOSS

from trl_qtarget.inspection.render import write_page


def pytest_configure(config):
    if kernels_on.DEVICE:
        kernels_on.install(kernels_on.DEVICE)
    # Tiny models gain nothing from threads, and workers of pytest-xdist would fight over the cores.
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    # Of transformers about an option that TRL's SFTConfig still has under this name.
    config.addinivalue_line("filterwarnings", "ignore:`gradient_checkpointing` is deprecated:FutureWarning")
    for name in ("trl", "accelerate", "bitsandbytes", "torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)


# Files whose fixtures are jobs of two processes, trainings of a command, or a browser: one worker runs all of each, so
# that none is started twice. All jobs are one group: two at a time would wait for each other's cores.
_JOBS = (
    "test_scale",
    "test_sharded_heads",
    "test_contract_sharded",
    "test_quantized",
    "test_interruption",
    "test_pieces",
    "test_refused",
)
_TOGETHER = {
    **dict.fromkeys(_JOBS, "jobs"),
    **dict.fromkeys(("test_inspection_page", "test_inspection_display"), "browser"),
    **{name: name for name in ("test_sft_script", "test_recipes", "test_plot", "test_package", "test_study")},
}


def pytest_itemcollected(item):  # pytest-xdist reads the groups before any later hook
    if group := _TOGETHER.get(item.path.stem):
        item.add_marker(pytest.mark.xdist_group(group))


def pytest_collection_finish():
    # Every training collects garbage, and half its time would go by in looks at the million objects that stay.
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """With an old TRL, a test that trains an auxiliary loss ends where the trainer refuses it."""
    try:
        return (yield)
    except ValueError as error:
        if not REFUSES_AUX_LOSS or not str(error).startswith("`router_aux_loss_coef`"):
            raise
        pytest.skip(str(error))


@pytest.fixture
def logged(caplog):
    """Messages that the package logs during a test."""
    caplog.set_level(logging.INFO, logger="trl_qtarget")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("trl_qtarget")]


@pytest.fixture
def nodes():
    """Two nodes, in networks of their own where this machine allows it."""
    with two_nodes() as made:
        yield made


# --- the page of an inspection, in Chromium ---


@pytest.fixture(scope="session")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright's Python package is not installed")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, tmp_path):
    """Opens the page of some data from disk; at the end nothing may have gone wrong, or asked for, unseen."""
    wrong, contexts = [], []

    def open_page(data, **options):
        path = tmp_path / "page.html"
        write_page(data, path)
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: wrong.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: request.url == path.as_uri() or wrong.append(f"request: {request.url}"))
        page.add_init_script(
            "window.violations = []; document.addEventListener('securitypolicyviolation',"
            " (event) => window.violations.push(event.violatedDirective));"
        )
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        for page in context.pages:
            assert page.evaluate("window.violations") == []
            assert page.evaluate("window.__hacked") is None
        context.close()
    assert [message for message in wrong if not message.startswith("request: blob:")] == []
