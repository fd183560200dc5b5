"""pytest options, fixtures and the closing report of ``pytest bench/``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench.errors import check_writable, user_error
from bench.latency.workload import choose_profile
from bench.machine.lock import machine_lock
from bench.progress import Bar, progress
from bench.suite.options import add_options
from bench.suite.run import Run, command_line

RUN = pytest.StashKey[Run]()
PAGE = pytest.StashKey[tuple[Path, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The suite's own options."""
    add_options(parser.getgroup("llama-onnx", "llama-onnx-bench").addoption)


def pytest_configure(config: pytest.Config) -> None:
    """Make the run; bad input ends here, before anything is loaded."""
    refuse_workers(config)
    run = Run(config.option, progress=lambda title, total: _progress(config, title, total))
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
        check_writable(run.options.report_dir)
        _ = run.dataset, run.deployment, run.folder, run.profile
    except Exception as error:
        told = user_error(error)
        if told is None:
            raise
        pytest.exit(f"error: {told[0]}", returncode=told[1])


@contextmanager
def _progress(config: pytest.Config, title: str, total: int | None) -> Iterator[Bar]:
    """A progress bar on the real terminal."""
    capture = config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else nullcontext(), progress(title, total) as bar:
        yield bar


@pytest.fixture(scope="session")
def run(request: pytest.FixtureRequest) -> Run:
    """The run; its sessions are closed when the page is written."""
    return request.config.stash[RUN]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Cases, sides and checks become parameters, so that each has a line of its own."""
    run = metafunc.config.stash[RUN]
    names = set(metafunc.fixturenames)
    if "check" in names:
        from bench.gate.registry import CHECKS

        checks = CHECKS if metafunc.config.option.collectonly else run.gate.specs
        metafunc.parametrize("check", checks, ids=[c.name for c in checks])
    if not names & {"case", "prefill_case", "side"}:
        return
    if metafunc.config.option.collectonly:  # nothing is resolved: no folder says which sides take part
        o = run.options
        cases = choose_profile(o.profile, o.batch_sizes, o.prompt_lengths, o.new_tokens).cases()
        labels = {case: ["candidate", "baseline"] for case in [None, *cases]}
    else:
        cases = run.profile.cases()
        labels = {case: run.measuring.labels(case) for case in [None, *cases]}
    if kind := next((n for n in ("case", "prefill_case") if n in names), None):
        pairs = [(c, s) for c in cases for s in labels[c] if kind == "prefill_case" or c.new_tokens > 1]
        metafunc.parametrize((kind, "side"), pairs, ids=[f"b{c.batch}-p{c.prompt}-{s}" for c, s in pairs])
    else:
        metafunc.parametrize("side", labels[None])


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Keep how each test ended, for the record and junit.xml."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.when == "call" or report.outcome == "failed" or report.skipped:
        from reports.record import Outcome

        said = "" if report.passed else str(getattr(report, "longrepr", "") or "").strip()
        text = (said.splitlines() or [""])[-1]
        kind: Any = "error" if report.failed and report.when != "call" else report.outcome
        item.config.stash[RUN].outcomes.append(
            Outcome(test=item.name, outcome=kind, seconds=max(0.0, report.duration), message=text[:500])
        )


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Write the page when anything was measured; the verdict is the exit code (3: undecided, as without checks)."""
    run = session.config.stash.get(RUN, None)
    told = run is not None and run.stopped and any(r.status == "FAIL" for r in run.gate.results)
    if run is None or session.config.option.collectonly or not (exitstatus in (0, 1) or told) or not run.anything:
        return
    from reports.publish import write_report
    from reports.verdict import judge

    record = run.record()
    session.config.stash[PAGE] = (write_report(record, run.options.report_dir), record)
    run.close()
    # A failure of pytest's own, or of a plugin, is never talked away.
    session.exitstatus = judge(record).exit_code or (1 if session.exitstatus else 0)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The table, the verdict and the path of the page."""
    found = config.stash.get(PAGE, None)
    if found is None:
        return
    from reports.render.terminal import print_summary

    page, record = found
    console = Console(file=terminalreporter._tw._file, width=max(80, terminalreporter._tw.fullwidth))
    print_summary(record, console)
    if config.stash[RUN].options.peers:
        from bench.peers.table import print_peers

        print_peers(record, config.stash[RUN].measuring.peers.skipped, console)
    terminalreporter.write_line(f"page: {page.resolve()}")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Put the fingerprint and the versions into pytest-benchmark's own JSON too."""
    from bench.machine.environment import machine, versions

    machine_info["llama_onnx"] = {**machine().model_dump(), "versions": versions()}
