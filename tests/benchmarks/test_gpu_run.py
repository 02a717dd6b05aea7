from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest

from benchmarks import gpu_run
from benchmarks.gpu_run import Stage

pytestmark = pytest.mark.skipif(os.name == "nt", reason="stages are stopped by POSIX signals")


def python(code):
    return [sys.executable, "-c", code]


def read(out):
    done = json.loads((out / "run.json").read_text(encoding="utf-8"))
    return {record["stage"]: record for record in done["stages"]}, done


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_run, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(gpu_run, "LEAST_SECONDS", 0.0)
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    out.mkdir()
    scratch.mkdir()
    return out, scratch


def test_each_stage_leaves_its_result_even_after_a_failure(folders):
    out, scratch = folders
    rows = '{"benchmarks": [1], "missing": [2], "machine_info": {}}'
    listed = [
        Stage("environment", python("print('noise'); print('{\"device\": \"D\"}')"), 0.5),
        Stage("tests", python("raise SystemExit(3)"), 0.5),
        Stage(
            "linear", python(f"open({str(scratch / 'linear.json')!r}, 'w').write({rows!r})"), 0.5
        ),
        Stage("block", python("import sys; sys.exit('dies before it writes')"), 0.5),
        Stage("files", python(f"open({str(scratch / 'files.json')!r}, 'w').write({rows!r})"), 0.5),
        Stage("tune", python("print('Row(1)')"), 0.5),
    ]
    assert gpu_run.run(listed, out, scratch, time.monotonic() + 60) == 1
    records, done = read(out)
    statuses = {name: record["status"] for name, record in records.items()}
    assert statuses == {
        "environment": 0,
        "tests": 3,
        "linear": 0,
        "block": 1,
        "files": 0,
        "tune": 0,
    }
    assert done["machine"] == {"device": "D"}
    merged = json.loads((out / "benchmarks.json").read_text(encoding="utf-8"))
    assert merged["benchmarks"] == [1, 1] and merged["missing"] == [2, 2]
    assert (out / "tuning.txt").read_text(encoding="utf-8") == "Row(1)\n"
    assert "dies before it writes" in (out / "run.log").read_text(encoding="utf-8")
    assert len(list(out.iterdir())) <= 8


def test_suites_are_told_when_to_stop(folders):
    out, scratch = folders
    show = python("import sys; print(sys.argv[1:])")
    listed = [Stage("linear", show, 1, stops_itself=True), Stage("tune", show, 1)]
    assert gpu_run.run(listed, out, scratch, time.monotonic() + 100.2) == 0
    log = (out / "run.log").read_text(encoding="utf-8")
    # Half, and then all that the first one left.
    assert "['--time-limit=49']" in log and re.search(r"\['--minutes=1.6[56]'\]", log)


def test_the_time_is_shared_among_the_stages_that_were_asked_for():
    weights, left, had = [20.0, 120.0, 70.0, 90.0, 60.0], 540.0, []
    for number in range(len(weights)):
        had.append(gpu_run.share(weights[number:], left))
        left -= had[-1]
    assert had == pytest.approx([30, 180, 105, 135, 90]) and left == pytest.approx(0)
    # A small one has what it takes to start, the last one no more than there is.
    assert gpu_run.share([1.0, 99.0], 100.0) == gpu_run.LEAST_SECONDS
    assert gpu_run.share([1.0, 99.0], 4.0) == 4.0 and gpu_run.share([1.0], -3.0) == -3.0


def test_what_a_stage_does_not_use_the_next_ones_have(folders, monkeypatch):
    out, scratch = folders
    now, limits = [0.0], []

    def run_stage(stage, log, limit):
        limits.append(limit)
        now[0] += {"first": 1.0, "large": limit, "tests": 5.0}[stage.name]
        return {"status": 0, "seconds": 0.0}

    monkeypatch.setattr(gpu_run, "_run_stage", run_stage)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    listed = [
        Stage(name, [], weight) for name, weight in (("first", 1), ("large", 2), ("tests", 2))
    ]
    assert gpu_run.run(listed, out, scratch, 101.0) == 0
    assert limits == pytest.approx([20.2, 50.0, 50.0])


def test_a_stage_and_its_children_are_stopped(folders):
    out, scratch = folders
    pid = scratch / "pid"
    stubborn = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN);"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        f"open({str(pid)!r}, 'w').write(str(child.pid)); time.sleep(60)"
    )
    listed = [Stage("linear", python(stubborn), 0.25), Stage("files", python("pass"), 0.75)]
    start = time.monotonic()
    assert gpu_run.run(listed, out, scratch, start + 8) == 1
    assert time.monotonic() - start < 8
    records, _ = read(out)
    assert records["linear"]["status"] == "stopped after 2 s" and records["files"]["status"] == 0
    assert not alive(int(pid.read_text()))


def test_a_suite_that_was_killed_leaves_the_rows_it_had(folders):
    out, scratch = folders
    lines = [
        {"machine_info": {"ceilings": 5}},
        {"benchmarks": "one"},
        {"missing": "two"},
        {"benchmarks": "three"},
    ]
    text = "\n".join(map(json.dumps, lines)) + '\n{"benchmarks": "cut sho'
    die = f"open({str(scratch / 'linear.jsonl')!r}, 'w').write({text!r}); import os; os.abort()"
    rows = '{"benchmarks": ["four"], "missing": [], "machine_info": {}}'
    whole = f"open({str(scratch / 'block.json')!r}, 'w').write({rows!r})"
    listed = [Stage("linear", python(die), 0.5), Stage("block", python(whole), 0.5)]
    assert gpu_run.run(listed, out, scratch, time.monotonic() + 60) == 1
    merged = json.loads((out / "benchmarks.json").read_text(encoding="utf-8"))
    assert merged["benchmarks"] == ["one", "three", "four"] and merged["missing"] == ["two"]
    assert merged["machine_info"] == {"ceilings": 5}


def test_who_is_stopped_stops_the_stage_first(tmp_path):
    pid = tmp_path / "pid"
    sleep = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = (
        "import runpy, sys; from benchmarks import gpu_run;"
        f"sys.argv = ['gpu_run', {str(tmp_path / 'out')!r}];"
        f"script = open(gpu_run.__file__).read().replace('_ENVIRONMENT, *st', '{'SLEEP'}, *st');"
        f"exec(compile(script, gpu_run.__file__, 'exec'),"
        f" dict(__name__='__main__', __file__=gpu_run.__file__, SLEEP={sleep!r}))"
    )
    run = subprocess.Popen(python(code), cwd=gpu_run.ROOT, env={**os.environ, "PYTHONPATH": "."})
    for _ in range(300):
        if pid.exists() and pid.read_text():
            break
        time.sleep(0.1)
    run.terminate()
    assert run.wait(timeout=30) == 143
    assert not alive(int(pid.read_text()))


def alive(pid):
    for _ in range(50):
        try:
            with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:
                if stat.read().rpartition(")")[2].split()[0] == "Z":
                    return False
        except FileNotFoundError:
            return False
        time.sleep(0.1)
    return True


def test_out_of_time(folders):
    out, scratch = folders
    assert gpu_run.run([Stage("tests", python("pass"), 0.5)], out, scratch, time.monotonic()) == 1
    assert read(out)[0]["tests"]["status"] == "not run: out of time"


def test_the_stages_and_their_order(tmp_path):
    listed = gpu_run.stages(tmp_path, tmp_path, ["--full"], "abc", jobs=3)
    names = [stage.name for stage in listed]
    assert names == [
        "environment",
        "check",
        "first",
        "large",
        "tests",
        "linear",
        "block",
        "training",
        "files",
        "tune",
        "others",
        "report",
    ]
    by_name = {stage.name: " ".join(stage.command) for stage in listed}
    assert "-m pytest" in by_name["tests"] and "-m gpu" in by_name["tests"]
    assert gpu_run.LARGE in by_name["large"] and f"--ignore={gpu_run.LARGE}" in by_name["tests"]
    file, _, name = gpu_run.WHOLE_CHECK.partition("::")
    assert (gpu_run.ROOT / gpu_run.LARGE).is_file()
    assert f"def {name}(" in (gpu_run.ROOT / file).read_text(encoding="utf-8")
    assert "-m lora_kernels check --jobs 3 --out" in by_name["check"]
    assert "-m benchmarks.first" in by_name["first"] and "--jobs 3" in by_name["first"]
    for folder in gpu_run.KERNELS_TESTS:
        assert (gpu_run.ROOT / folder).is_dir()
        assert folder in by_name["tests"] and f"--ignore={folder}" in by_name["others"]
    for suite in gpu_run.SUITES:
        assert (gpu_run.ROOT / "benchmarks" / f"test_{suite}.py").is_file()
        assert "--full" in by_name[suite] and "--commit abc" in by_name[suite]


@pytest.mark.slow
def test_uninstalled_from_another_folder(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    script = str(gpu_run.ROOT / "benchmarks" / "gpu_run.py")
    (tmp_path / "results").mkdir()
    measured = max((gpu_run.ROOT / "benchmarks" / "results").glob("*/benchmarks.json"))
    shutil.copy(measured, tmp_path / "results")
    command = [sys.executable, script, "results", "--minutes", "3", "--stages"]
    command.append("environment,report")
    done = subprocess.run(
        [*command, "--commit", "abc"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    _, run = read(tmp_path / "results")
    assert run["machine"]["commit"] == "abc" and run["machine"]["ceilings"]["bandwidth"] > 0
    assert "## " in (tmp_path / "results" / "report.md").read_text(encoding="utf-8")


def test_a_pack_is_adopted_first_and_nothing_compiled_ahead(tmp_path, monkeypatch):
    pack, seen = tmp_path / "kernels.pack", []
    pack.write_bytes(b"")
    monkeypatch.setattr(gpu_run, "run", lambda listed, *rest: seen.extend(listed) or 0)
    arguments = ["--stages", "first,adopt,check", "--pack", str(pack)]
    assert gpu_run.main([str(tmp_path / "out"), *arguments]) == 0
    assert [stage.name for stage in seen] == ["adopt", "check", "first"]
    assert seen[0].command[-2:] == ["adopt", str(pack)]
    assert seen[2].command[-2:] == ["--jobs", "0"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pack", "nowhere.pack"], "there is no file"),
        (["--stages", "adopt,check"], "stage adopt needs a pack: --pack FILE"),
    ],
)
def test_a_pack_that_is_not_there(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu_run.main([str(tmp_path / "out"), *arguments])
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_unknown_stage(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu_run.main([str(tmp_path / "out"), "--stages", "linear,magic"])
    assert "no stage magic; there are environment, check, first" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
