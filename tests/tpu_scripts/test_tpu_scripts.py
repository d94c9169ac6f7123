"""The TPU scripts against a gcloud that records its calls and runs the workers' commands here."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what runs on the workers is for Linux")

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "tpu_scripts"
STEPS = ("create", "setup", "run", "collect", "delete")
MACHINE = ("PROJECT_ID", "ZONE", "TPU_NAME")
NEEDED = {
    "create": (*MACHINE, "TPU_TYPE"),
    "setup": (*MACHINE, "TPU_TYPE"),
    "run": (*MACHINE, "TPU_TYPE"),
    "collect": (*MACHINE, "BUCKET"),
    "delete": MACHINE,
    "all": (*MACHINE, "TPU_TYPE", "BUCKET"),
}
SETTINGS = {
    "PROJECT_ID": "my-project",
    "ZONE": "my-zone",
    "TPU_NAME": "my-tpu",
    "TPU_TYPE": "v5e-16",
    "BUCKET": "gs://my-bucket/edits/",
}
TYPES = {  # accelerator type, runtime version, VMs
    "v5e-8": ("v5litepod-8", "v2-alpha-tpuv5-lite", 1),
    "v5e-16": ("v5litepod-16", "v2-alpha-tpuv5-lite", 4),
    "v5p-8": ("v5p-8", "v2-alpha-tpuv5", 1),
    "v6e-8": ("v6e-8", "v2-alpha-tpuv6e", 1),
}
# Instead of the VM's python3, which would install: it says what it was asked for.
PYTHON = """#!/bin/sh
echo "$*" >>"$HOME/installs"
case $* in *"uv venv"*) mkdir -p .venv/bin && ln -s /bin/true .venv/bin/python ;; esac
"""


class Cloud:
    def __init__(self, folder: Path) -> None:
        self.fake, self.cwd, self.path = folder / "fake", folder / "cwd", folder / "path"
        for each in (self.fake / "bin", self.cwd, self.path):
            each.mkdir(parents=True)
        (self.path / "gcloud").symlink_to(Path(__file__).with_name("gcloud"))
        (self.fake / "bin" / "python3").write_text(PYTHON)
        (self.fake / "bin" / "python3").chmod(0o755)
        self.write("workers", "4")

    def write(self, name: str, text: str) -> None:
        (self.fake / name).write_text(text + "\n")

    def exists(self, kind: str = "tpu-vm") -> bool:
        return (self.fake / kind).exists()

    def calls(self, pattern: str = "") -> list[str]:
        """gcloud's arguments, call by call, of those that match."""
        path = self.fake / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if re.search(pattern, line)]

    def environment(self, **changes: str | None) -> dict[str, str]:
        own = {k: v for k, v in os.environ.items() if k not in (*SETTINGS, "JOB", "LOGS")}
        own |= {"PATH": f"{self.path}:{os.environ['PATH']}", "FAKE": str(self.fake), "POLL_SECONDS": "0"}
        return {k: v for k, v in {**own, **SETTINGS, **changes}.items() if v is not None}

    def start(self, script: str, *arguments: str, **changes: str | None) -> subprocess.Popen[str]:
        command = [str(SCRIPTS / f"{script}.sh"), *arguments]
        pipe = subprocess.PIPE
        env = self.environment(**changes)
        return subprocess.Popen(command, cwd=self.cwd, env=env, stdout=pipe, stderr=pipe, text=True)

    def __call__(self, script: str, *arguments: str, **changes: str | None) -> tuple[int, str, str]:
        """Exit status, standard output, standard error of a script."""
        process = self.start(script, *arguments, **changes)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err

    def log(self, worker: int, job: str = "j1") -> str:
        return (self.cwd / f"runs/tpu-logs/my-tpu/{job}/worker-{worker}.log").read_text()


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    return Cloud(tmp_path)


@pytest.fixture
def machine(cloud: Cloud) -> Cloud:
    """A machine that was created and has worker.sh, without what setup.sh installs."""
    cloud.write("tpu-vm", "my-tpu")
    for worker in range(4):
        home = cloud.fake / f"home-{worker}/locft-jax/tpu_scripts"
        home.mkdir(parents=True)
        shutil.copy(SCRIPTS / "worker.sh", home)
    return cloud


def test_shellcheck():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "shellcheck is part of the test extra: pip install .[test]"
    scripts = [*ROOT.glob("tpu_scripts/*.sh"), *ROOT.glob("benchmarks/*.sh"), ROOT / ".ci/run"]
    assert len(scripts) > len(STEPS)
    command = [shellcheck, "-x", *map(str, scripts), str(Path(__file__).with_name("gcloud"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_all_steps(cloud, tmp_path):
    edits = tmp_path / "my edits.jsonl"
    edits.write_text("{}\n")
    command = ("bash", "-c", 'mkdir -p runs/x && echo "$0 in $PWD"', "it's $me")
    status, out, err = cloud("all", str(edits), "--", *command, JOB="j1")
    assert status == 0, err
    kinds = "tpu-vm create|tpu-vm scp|install|worker.sh|rsync|tpu-vm delete"
    seen = [re.search(kinds, call).group() for call in cloud.calls(kinds)]
    assert list(dict.fromkeys(seen)) == kinds.split("|")
    assert [seen.count(kind) for kind in kinds.split("|")] == [1, 4, 4, 4, 3, 1]
    assert not cloud.exists()

    (create,) = cloud.calls("tpu-vm create my-tpu ")
    assert "--accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite" in create
    for worker in range(4):
        project = cloud.fake / f"home-{worker}" / "locft-jax"
        assert (project / "my edits.jsonl").read_text() == "{}\n"
        assert (project / "locft_jax/edit.py").exists() and (project / "configs").is_dir()
        installs = (project.parent / "installs").read_text()
        assert re.search(r"uv pip install .*\.venv/bin/python \.\[tpu,gcs\]", installs)
        assert cloud.log(worker) == f"it's $me in {project}\n"
    assert f"it's $me in {cloud.fake}/home-0/locft-jax\n" in out  # worker 0's is shown as it comes
    (results,) = cloud.calls(r"^storage .*locft-jax/runs")  # the call that worker 0 made
    assert results == "storage rsync --recursive locft-jax/runs gs://my-bucket/edits/my-tpu/runs"
    (logs,) = cloud.calls(r"^storage .*tpu-logs")
    assert logs.startswith("storage rsync --recursive runs/tpu-logs/my-tpu gs://my-bucket/edits/my-tpu/logs ")
    everything = cloud.calls("^compute")
    assert all(" --project=my-project --zone=my-zone --quiet" in call for call in everything)


@pytest.mark.parametrize("kind", TYPES)
def test_dry_run(cloud, kind):
    """It needs no gcloud and does nothing."""
    accelerator, runtime, workers = TYPES[kind]
    (cloud.path / "gcloud").unlink()
    arguments = ("--dry-run", "--queued", "--spot", str(ROOT / "LICENSE"), "--", "echo", "it's a b")
    status, out, err = cloud("all", *arguments, TPU_TYPE=kind, PATH=f"{cloud.path}:/usr/bin:/bin")
    assert status == 0, err
    assert not any(cloud.cwd.iterdir()) and not cloud.calls()
    words = [shlex.split(line) for line in out.splitlines()]
    assert {line[0] for line in words} == {"gcloud", "mkdir", "tar", "wait"}
    (create,) = (line for line in words if "create" in line)
    assert {f"--accelerator-type={accelerator}", f"--runtime-version={runtime}", "--spot"} <= set(create)
    assert sum("worker.sh" in line for line in out.splitlines()) == workers


def test_dry_run_pasted_into_a_shell_makes_the_same_calls(cloud):
    arguments = ("--queued", str(ROOT / "LICENSE"), "--", "echo", "it's a b")
    status, out, err = cloud("all", "--dry-run", *arguments, JOB="j1")
    assert status == 0, err
    cloud.write("states", "ACTIVE")
    env = cloud.environment()
    subprocess.run(["bash", "-c", out], env=env, cwd=cloud.cwd, check=True, capture_output=True, timeout=300)
    assert cloud.log(3) == "it's a b\n"
    pasted = sorted(cloud.calls())
    shutil.rmtree(cloud.cwd / "runs")
    (cloud.fake / "calls").unlink()
    cloud.write("states", "ACTIVE")
    status, _, err = cloud("all", *arguments, JOB="j2")
    assert status == 0, err
    assert pasted == sorted(call.replace(" j2 ", " j1 ") for call in cloud.calls())


@pytest.mark.parametrize("script", NEEDED)
def test_what_is_missing(cloud, script):
    """Status 2 and a message that names it, before any call."""
    arguments = {"run": ["true"], "all": ["--", "true"]}.get(script, [])
    for name in NEEDED[script]:
        for value in ("", None):
            status, out, err = cloud(script, *arguments, **{name: value})
            assert (status, out) == (2, "")
            assert re.findall(r"export (\w+)=", err) == [name]
    tools = cloud.path / "tools"
    tools.mkdir()
    for tool in ("bash", "dirname"):
        (tools / tool).symlink_to(shutil.which(tool))
    status, out, err = cloud(script, *arguments, PATH=str(tools))
    assert (status, out) == (2, "") and err.startswith("error: gcloud is not on PATH")
    assert not cloud.calls()


@pytest.mark.parametrize(
    ("script", "arguments", "changes", "message"),
    [
        ("create", [], {"TPU_TYPE": "v4-8"}, "TPU_TYPE=v4-8: it must be v5e-8, v5e-16, v5p-8 or v6e-8"),
        ("collect", [], {"BUCKET": "my-bucket"}, "BUCKET=my-bucket: it must begin with gs://"),
        ("setup", ["--spot"], {}, "--spot: not an option"),
        ("setup", ["edits.jsonl"], {}, "edits.jsonl: no such file"),
        ("run", [], {}, "no command"),
        ("run", ["true"], {"JOB": "../x"}, "JOB=../x: letters"),
        ("delete", ["other-tpu"], {}, "takes options only, not: other-tpu"),
        ("all", ["edits.jsonl", "--", "true"], {}, "edits.jsonl: no such file"),
        ("all", ["--"], {}, "no command"),
    ],
)
def test_wrong_use(cloud, script, arguments, changes, message):
    status, out, err = cloud(script, *arguments, **changes)
    assert (status, out) == (2, "") and err.startswith("error: ") and message in err
    assert not cloud.calls()


@pytest.mark.parametrize("script", NEEDED)
def test_help(cloud, script):
    status, out, err = cloud(script, "--help", PROJECT_ID=None)
    assert status == 0 and f"{script}.sh [--" in out and "Environment: PROJECT_ID ZONE" in out, err


@pytest.mark.parametrize(
    ("pattern", "printed"),
    [
        ("tpu-vm create", "tpu-vm in my-zone"),
        ("scp", "tpu-vm in my-zone"),
        ("worker=2 .*install", "worker 2: status 7; the end of runs/tpu-logs/my-tpu/setup/worker-2.log:"),
        ("^storage .*locft-jax/runs", "tpu-vm in my-zone"),
        ("tpu-vm delete", "my-tpu"),
    ],
)
def test_a_step_that_fails_tells_of_the_machine(cloud, pattern, printed):
    cloud.write("fail", pattern)
    status, _, err = cloud("all", "--", "true")
    assert status == 7, err
    assert printed in err and "all.sh ended with status 7" in err
    if "delete" in pattern:
        return  # the fake's deletes work, even if they say otherwise
    assert cloud.exists() and "my-tpu (tpu-vm in my-zone) still exists: it is paid for until" in err
    (told,) = re.findall(r"^delete it: (.*)$", err, re.M)
    env = {k: v for k, v in cloud.environment().items() if k not in SETTINGS}
    subprocess.run(["bash", "-c", told], env=env, check=True, capture_output=True)
    assert not cloud.exists()

    status, _, err = cloud("all", "--delete-on-failure", "--", "true")
    assert status == 7 and not cloud.exists()
    assert "my-tpu in my-zone: deleted" in err and "delete it:" not in err


def test_failure_when_gcloud_cannot_say_what_exists(machine):
    machine.write("fail", "list|scp")
    status, _, err = machine("setup", "--delete-on-failure")
    assert status == 7 and "gcloud cannot say whether my-tpu (tpu-vm in my-zone) exists" in err
    assert "delete.sh ended with status 1" in err and "delete it: env PROJECT_ID=my-project" in err


def test_failure_that_leaves_nothing(cloud):
    cloud.write("tpu-vm", "my-tpu-2")  # another's
    (cloud.path / "gcloud").unlink()
    (cloud.path / "gcloud").write_text("#!/bin/sh\ncase $* in *list*) echo my-tpu-2 ;; *) exit 1 ;; esac\n")
    (cloud.path / "gcloud").chmod(0o755)
    status, _, err = cloud("create")
    assert status == 1 and "no machine called my-tpu is left in my-zone" in err and "delete it" not in err


@pytest.mark.parametrize("kind", ["tpu-vm", "queued-resources"])
def test_create_leaves_a_machine_that_was_there_alone(cloud, kind):
    cloud.write(kind, "my-tpu")
    for script, arguments in (("create", []), ("all", ["--", "true"])):
        status, _, err = cloud(script, "--delete-on-failure", *arguments)
        assert status == 2 and f"my-tpu ({kind} in my-zone) exists" in err
    assert cloud.exists(kind) and not cloud.calls("create|delete")


def test_queued_resource(cloud):
    cloud.write("states", "WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE")
    status, _, err = cloud("create", "--queued", "--", "--network=mine")
    assert status == 0, err
    (create,) = cloud.calls("create")
    assert create.startswith("compute tpus queued-resources create my-tpu --node-id=my-tpu ")
    assert "--runtime-version=v2-alpha-tpuv5-lite --network=mine " in create and "--spot" not in create
    assert len(cloud.calls("describe")) == 3
    status, _, err = cloud("delete")
    assert status == 0 and "my-tpu in my-zone: deleted" in err
    assert not cloud.exists("queued-resources")
    assert cloud.calls("queued-resources delete my-tpu --force ")


def test_queued_resource_that_fails_is_told_of(cloud):
    cloud.write("states", "PROVISIONING\nFAILED")
    status, _, err = cloud("create", "--queued")
    assert status == 1 and "my-tpu in the queue: FAILED" in err
    assert "my-tpu (queued-resources in my-zone) still exists" in err and "delete it: env" in err


def test_delete_of_nothing(cloud):
    status, _, err = cloud("delete")
    assert status == 0 and "my-tpu in my-zone: there is none" in err
    assert not cloud.calls("delete")


def test_run_gives_the_status_of_the_worker_that_failed(machine):
    """Not of those that JAX ended because it did: 134, or 1 with a message."""
    says = "failed: another process of this run died or cannot be reached"
    ends = f"0) kill -ABRT $$ ;; *1) echo {says}; exit 1 ;; *2) exit 5"
    script = f'echo "$HOME"; case $HOME in *{ends} ;; esac'
    status, _, err = machine("run", "bash", "-c", script, JOB="j1")
    assert status == 5
    for worker in range(4):
        assert machine.log(worker).startswith(f"{machine.fake}/home-{worker}\n")
    assert re.findall(r"worker (\d): status (\d+)", err) == [("0", "134"), ("1", "1"), ("2", "5")]
    assert "worker 2: status 5; the end of runs/tpu-logs/my-tpu/j1/worker-2.log:\n    " in err
    assert err.count("it ended because another worker died") == 2
    assert "still exists" in err

    status, _, err = machine("run", "bash", "-c", "kill -ABRT $$", JOB="j2")
    assert status == 134 and err.count("it ended because another worker died") == 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_run_that_is_interrupted_goes_on_and_can_be_followed(machine, number):
    machine.write("workers", "2")
    script = 'echo begun; echo x >>"$HOME/starts"; until [ -e "$HOME/go" ]; do sleep 0.05; done; exit 3'
    command = ("run", "bash", "-c", script)
    process = machine.start(*command, JOB="j1")
    homes = [machine.fake / f"home-{worker}" for worker in range(2)]
    while not all((home / "starts").exists() for home in homes):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=300)  # it would wait for a gcloud that it left behind
    assert process.returncode == 128 + number
    assert "the command goes on there; to follow it again: JOB=j1" in err and "still exists" in err

    for home in homes:
        (home / "go").touch()
    status, out, err = machine(*command, JOB="j1")
    assert status == 3 and out == "begun\n", err
    assert [(home / "starts").read_text() for home in homes] == ["x\n"] * 2


def test_readme_names_the_scripts_and_settings():
    text = (SCRIPTS / "README.md").read_text()
    assert {f"{step}.sh" for step in (*STEPS, "all")} <= set(re.findall(r"\w+\.sh", text))
    assert all(name in text for name in (*SETTINGS, *TYPES))
