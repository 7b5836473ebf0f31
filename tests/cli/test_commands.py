"""Every verb explains itself, fails with a sentence and what to do next, and passes on what it runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lens.cli.errors import DONE, UNUSABLE
from lens.cli.main import VERBS, main


def lens(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lens", *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "LENS_AGENT": "0", **environment},
        timeout=120,
    )


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    assert "--json" in capsys.readouterr().out


def test_help_names_every_verb_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(verb in text for verb in VERBS)
    assert "130" in text


@pytest.mark.parametrize("words", [["list"], ["diagnose", "latest"]])
def test_a_missing_folder_is_named_with_the_way_out(words: list[str], tmp_path: Path) -> None:
    result = lens(*words, "--data", str(tmp_path / "none"), "--json", cwd=tmp_path)
    reply = json.loads(result.stdout)
    assert result.returncode == reply["exit_code"] == UNUSABLE
    assert "none" in reply["error"]
    assert "lens demo" in reply["hint"]
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("content", ["", "rubbish\n", '{"type":"sample"}\n'])
def test_a_file_without_records_is_unusable_or_insufficient(content: str, tmp_path: Path) -> None:
    path = tmp_path / "records.ndjson"
    path.write_text(content)
    result = lens("diagnose", str(path), "--json", cwd=tmp_path)
    reply = json.loads(result.stdout)
    if content:
        assert result.returncode == UNUSABLE
        assert "cannot be used" in reply["error"]
    else:
        assert (result.returncode, reply["status"]) == (DONE, "insufficient")


def test_a_bad_setting_is_named(tmp_path: Path) -> None:
    result = lens("list", cwd=tmp_path, LENS_RING_MIB="many")
    assert result.returncode == UNUSABLE
    assert "ring_mib = 'many' (from environment)" in result.stderr


def test_doctor_tells_what_is_here(tmp_path: Path) -> None:
    result = lens("doctor", "--json", cwd=tmp_path, LENS_RINGS=str(tmp_path / "rings"))
    reply = json.loads(result.stdout)
    states = {check["name"]: check["state"] for check in reply["checks"]}
    assert result.returncode == DONE
    assert states["python"] == states["rings"] == "ok"
    broken = lens("doctor", "--json", cwd=tmp_path, LENS_RINGS="/proc/nowhere")
    assert broken.returncode == 4
    assert json.loads(broken.stdout)["ok"] is False


@pytest.mark.parametrize("code", [0, 1, 3])
def test_run_passes_the_exit_code_and_all_output_on(code: int, tmp_path: Path) -> None:
    program = f"import sys; print('out'); print('err', file=sys.stderr); sys.exit({code})"
    result = lens("run", "--", sys.executable, "-c", program, cwd=tmp_path)
    assert result.returncode == code
    assert result.stdout == "out\n"
    assert result.stderr.splitlines()[-1] == "err"


def test_run_passes_standard_input_and_a_run_id_on(tmp_path: Path) -> None:
    program = "import os, sys; print(sys.stdin.read(), os.environ['LENS_RUN'])"
    result = subprocess.run(
        [sys.executable, "-m", "lens", "run", "--run", "mine", "--", sys.executable, "-c", program],
        input="typed", capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "LENS_AGENT": "0"},
    )  # fmt: skip
    assert result.stdout == "typed mine\n"


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_run_ends_as_its_command_ended(number: signal.Signals, tmp_path: Path) -> None:
    program = f"import os; os.kill(os.getpid(), {int(number)})"
    result = lens("run", "--", sys.executable, "-c", program, cwd=tmp_path)
    assert result.returncode == -number


@pytest.mark.processes
def test_run_hands_a_polite_signal_to_its_command(tmp_path: Path) -> None:
    program = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-m", "lens", "run", "--", sys.executable, "-c", program],
        stdout=subprocess.PIPE, text=True, cwd=tmp_path, env={**os.environ, "LENS_AGENT": "0"},
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.terminate()
    assert child.wait(90) == 7


def test_run_goes_on_where_no_agent_can_be_started(tmp_path: Path) -> None:
    (tmp_path / "rings").write_text("in the way")
    program = "import sys; print('trained'); sys.exit(3)"
    result = lens("run", "--", sys.executable, "-c", program, cwd=tmp_path, LENS_AGENT="1", LENS_RINGS="rings")
    assert (result.returncode, result.stdout) == (3, "trained\n")
    assert "no agent, training goes on" in result.stderr


@pytest.mark.parametrize("words", [["run"], ["run", "--", "no-such-command-anywhere"]])
def test_run_without_a_usable_command_says_so(words: list[str], tmp_path: Path) -> None:
    result = lens(*words, cwd=tmp_path)
    assert result.returncode == UNUSABLE
    assert "lens run --" in result.stderr or "check the spelling" in result.stderr
