"""pytest options, fixtures and the closing report of ``pytest bench/``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench.cli.progress import progress
from bench.errors import user_error
from bench.gate.gate_names import CHECKS, metric_names
from bench.latency.workload import PROFILES, choose_profile
from bench.machine.lock import machine_lock
from bench.suite.run import Options, Run, Ticker, command_line

RUN = pytest.StashKey[Run]()
PAGE = pytest.StashKey[tuple[Path, Any]]()


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise pytest.UsageError(f"{text!r} is not a list of numbers; write for example 1,4,8") from None


def pytest_addoption(parser: pytest.Parser) -> None:
    """The suite's own options."""
    group = parser.getgroup("llama-onnx", "llama-onnx-bench")
    group.addoption("--model", default="demo", help="'demo', a checkpoint folder, a .gguf file or a hub id")
    group.addoption("--exported", type=Path, help="test this exported folder; --model is then its baseline")
    group.addoption("--provider", default="auto", help="cpu, cuda, tensorrt or auto")
    group.addoption(
        "--precision", default="auto", help="fp32, fp16, bf16, int8, int4 or auto (fp32 on the CPU, fp16 on a GPU)"
    )
    group.addoption("--target", default="auto", help="ort, tensorrt, plain or auto (ort for a LLaMA, else plain)")
    group.addoption("--method", help="int8 and int4: rtn, hqq, kquant or gptq")
    group.addoption("--profile", default="standard", choices=sorted(PROFILES), help="how much is measured")
    group.addoption("--batch-sizes", type=_numbers, default=(), help="for example 1,4")
    group.addoption("--prompt-lengths", type=_numbers, default=(), help="in tokens, for example 128,1024")
    group.addoption("--new-tokens", type=int, help="tokens generated in each latency round")
    group.addoption(
        "--dataset", help="JSONL file (bench/data/README.md) or hf:NAME[:CONFIG][@SPLIT] in place of the project's data"
    )
    group.addoption("--threads", type=int, help="CPU threads of every side")
    group.addoption("--peers", action="store_true", help="torch.compile, onnxruntime-genai and llama.cpp beside it")
    group.addoption("--gguf", type=Path, help="the file that llama.cpp runs with --peers")
    group.addoption("--wait", dest="lock_wait", type=float, default=0.0, help="seconds to wait for another measurement")
    group.addoption("--report-dir", type=Path, default=Path("reports/out"), help="where the page is written")


def pytest_configure(config: pytest.Config) -> None:
    """Make the run; bad input ends here, before anything is loaded."""
    o = config.option
    refuse_workers(config)
    options = Options(
        model=o.model,
        exported=o.exported,
        provider=o.provider,
        precision=o.precision,
        target=o.target,
        method=o.method,
        profile=o.profile,
        batch_sizes=o.batch_sizes,
        prompt_lengths=o.prompt_lengths,
        new_tokens=o.new_tokens,
        dataset=o.dataset,
        threads=o.threads,
        peers=o.peers,
        gguf=o.gguf,
        out=o.report_dir,
    )
    run = Run(options, progress=lambda title, total: _progress(config, title, total))
    run.command = command_line([str(a) for a in config.invocation_params.args])
    config.stash[RUN] = run


def refuse_workers(config: pytest.Config) -> None:
    """``pytest bench/ -n`` would measure the workers against each other.

    Raises:
        pytest.UsageError: xdist was asked for workers, or this is one.
    """
    workers = getattr(config.option, "numprocesses", None)
    if hasattr(config, "workerinput") or workers:
        raise pytest.UsageError("pytest bench/ measures: workers (-n) would measure each other; leave -n out")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Resolve the model, the folder and the data; an error of the user's ends the run with its own exit code."""
    config = session.config
    if config.option.collectonly:
        return
    run = config.stash[RUN]
    held = ExitStack()
    try:
        held.enter_context(machine_lock("pytest bench/", config.option.lock_wait))
        config.add_cleanup(held.close)
        _ = run.dataset, run.provider, run.folder, run.profile
    except Exception as error:
        told = user_error(error)
        if told is None:
            raise
        pytest.exit(f"error: {told[0]}", returncode=told[1])


@contextmanager
def _progress(config: pytest.Config, title: str, total: int) -> Iterator[Ticker]:
    """A progress bar on the real terminal."""
    capture = config.pluginmanager.getplugin("capturemanager")
    with _uncaptured(capture), progress(title, total) as bar:
        yield bar.tick


@contextmanager
def _uncaptured(capture: Any) -> Iterator[None]:
    if capture is None:
        yield
        return
    with capture.global_and_fixture_disabled():
        yield


@pytest.fixture(scope="session")
def run(request: pytest.FixtureRequest) -> Run:
    """The run; its sessions are closed when the page is written."""
    return request.config.stash[RUN]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Cases, sides, checks and task metrics become parameters, so that each has a line of its own."""
    run = metafunc.config.stash[RUN]
    names = set(metafunc.fixturenames)
    if {"case", "side"} <= names:
        o = run.options
        if "folder" in run.__dict__:
            cases = run.profile.cases()
        else:
            cases = choose_profile(o.profile, o.batch_sizes, o.prompt_lengths, o.new_tokens).cases()
        pairs = [(c, s) for c in cases for s in run.labels(c)]
        metafunc.parametrize(("case", "side"), pairs, ids=[f"b{c.batch}-p{c.prompt}-{s}" for c, s in pairs])
    elif "side" in names:
        metafunc.parametrize("side", run.labels())
    if "check_name" in names:
        metafunc.parametrize("check_name", CHECKS)
    if "task_metric" in names:
        metafunc.parametrize("task_metric", metric_names(run.dataset), ids=lambda pair: "-".join(pair))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Keep how each test ended, for the record and junit.xml."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    interesting = report.when == "call" or (report.when == "setup" and report.outcome != "passed")
    if interesting:
        from reports.record import Outcome

        message = "" if report.passed else str(getattr(report, "longrepr", "") or "").strip().splitlines()[-1:]
        text = message if isinstance(message, str) else (message[0] if message else "")
        kind: Any = "error" if report.failed and report.when == "setup" else report.outcome
        item.config.stash[RUN].outcomes.append(
            Outcome(test=item.name, outcome=kind, seconds=max(0.0, report.duration), message=text[:500])
        )


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Write the page when anything was measured."""
    run = session.config.stash.get(RUN, None)
    if run is None or not (run.series or run.parity or run.memory or run.loads):
        return
    from reports.publish import write_report

    record = run.record()
    session.config.stash[PAGE] = (write_report(record, run.options.out), record)
    run.close()


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The table, the verdict and the path of the page."""
    found = config.stash.get(PAGE, None)
    if found is None:
        return
    from reports.render.terminal import print_summary

    page, record = found
    width = terminalreporter._tw.fullwidth
    print_summary(record, Console(file=terminalreporter._tw._file, width=max(80, width)))
    if config.stash[RUN].options.peers:
        from bench.peers.table import peer_rows, print_peers

        console = Console(file=terminalreporter._tw._file, width=max(80, width))
        print_peers(peer_rows(record), config.stash[RUN].peers.skipped, console)
    terminalreporter.write_line(f"page: {page.resolve()}")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Put the fingerprint and the versions into pytest-benchmark's own JSON too."""
    from bench.machine.environment import machine, versions

    machine_info["llama_onnx"] = {**machine().model_dump(), "versions": versions()}
