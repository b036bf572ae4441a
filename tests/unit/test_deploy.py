"""The files in deploy/: what they name is there, and their flags and keys are known."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from inferlab.cli import make_parser
from inferlab.server.replicas.options import from_mapping

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILES = sorted(DEPLOY.glob("Dockerfile.*"))
FILES = sorted(path for path in DEPLOY.iterdir() if path.is_file())


def parsed(words):
    """The arguments of an `inferlab` command; an unknown flag fails."""
    assert words[0] == "inferlab"
    return make_parser(only=words[1]).parse_args(words[1:])


def instructions(path):
    """(instruction, rest) of each line of a Dockerfile, continued lines joined."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


def test_all_files_are_looked_at():
    assert {path.name for path in FILES} == {
        *("Dockerfile.cpu", "Dockerfile.cuda", "skypilot.yaml", "kuberay.yaml")
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_they_name_no_machine_of_ours(path):
    hosts = set(re.findall(r"https?://([^/:\s'\"]+)", path.read_text()))
    assert hosts <= {"127.0.0.1", "download.pytorch.org"}
    assert not re.search(r"(?<![\w.$~])/(work|tmp|home/(?!inferlab))", path.read_text())


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_images_are_built_in_stages_of_files_that_exist(path):
    made = instructions(path)
    stages = [rest for name, rest in made if name == "FROM"]
    assert len(stages) == 2
    assert all(":" in stage.split()[0] for stage in stages), "with a tag"
    copied = [rest.split() for name, rest in made if name == "COPY"]
    for *sources, _ in (words for words in copied if not words[0].startswith("--from")):
        assert all((ROOT / source).exists() for source in sources), sources
    needed = re.findall(r'"(\w+\.(?:md|txt))"|license-files = \["(\w+)"\]', _pyproject())
    for name in {a or b for a, b in needed}:
        assert any(name in words for words in copied), f"the build reads {name}"


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_images_ask_for_options_and_extras_that_exist(path):
    text = path.read_text()
    cmake = "".join(file.read_text() for file in (ROOT / "cmake").glob("*.cmake"))
    for option in re.findall(r"cmake\.define\.(\w+)=", text):
        assert option in cmake
    extras = re.findall(r"\.whl\)\[([\w,]+)\]", text)
    assert extras
    for extra in ",".join(extras).split(","):
        assert re.search(rf"^{extra} = \[", _pyproject(), re.MULTILINE)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_images_run_the_server_as_nobody_in_particular_and_watch_it(path):
    made = dict(instructions(path))
    assert made["USER"] not in ("root", "0")
    words = json.loads(made["ENTRYPOINT"]) + json.loads(made["CMD"])
    args = parsed(words)
    assert args.host == "0.0.0.0"
    assert made["EXPOSE"] == str(args.port)
    asking = json.loads(made["HEALTHCHECK"].split("CMD", 1)[1])
    assert f"http://127.0.0.1:{args.port}/health" in asking[-1]
    compile(asking[-1], "HEALTHCHECK", "exec")
    for line in path.read_text().splitlines():
        if line.startswith("#") and "inferlab:" in line and " serve " in line:
            parsed(["inferlab", *shlex.split(line.split("inferlab:", 1)[1])[1:]])


@pytest.fixture(scope="module")
def task():
    return yaml.safe_load((DEPLOY / "skypilot.yaml").read_text())


def test_the_benchmark_runs_on_the_gpus_that_it_is_for(task):
    assert set(task) <= {*("name", "resources", "envs", "workdir", "file_mounts", "setup", "run")}
    choices = [one["accelerators"].split(":") for one in task["resources"]["any_of"]]
    assert all(name.split("-")[0] in ("A100", "H100") and n == "1" for name, n in choices)
    assert task["file_mounts"]["/results"]["mode"] == "MOUNT"
    assert task["envs"]["RESULTS_BUCKET"] is None, "SkyPilot asks for it"


@pytest.mark.parametrize("part", ["setup", "run"])
def test_its_scripts_are_bash_and_name_what_exists(task, part):
    script = task[part]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    for name in re.findall(r"\b(?:benchmarks|deploy|tests)/[\w./]+", script):
        assert (ROOT / name).exists(), name
    own = set(re.findall(r"\b([A-Za-z]\w*)=", script)) | {"PATH"}
    used = set(re.findall(r"\$\{?([A-Za-z]\w*)", script))
    assert used <= own | set(task["envs"])


def test_its_commands_are_understood(task):
    script = task["run"].replace("\\\n", " ")
    commands = [
        shlex.split(found.split("||")[0])
        for found in re.findall(r"^\s*((?:inferlab|bash) .*)$", script, re.MULTILINE)
    ]
    device, *benches = commands
    text = (ROOT / device[1]).read_text()
    for flag in (word for word in device if word.startswith("--")):
        assert f"    {flag}) " in text
    assert len(benches) == 2
    for words in benches:
        args = parsed(words)
        assert args.output.startswith("$local/")
    assert 'cp -r "$local"/. "$results"/' in script, "results are kept"


@pytest.fixture(scope="module")
def service():
    return yaml.safe_load((DEPLOY / "kuberay.yaml").read_text())


def groups(service):
    cluster = service["spec"]["rayClusterConfig"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def test_the_manifest_serves_what_the_builder_understands(service):
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    (app,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    module, function = app["import_path"].split(":")
    source = (ROOT / "python" / Path(*module.split("."))).with_suffix(".py").read_text()
    defined = [node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    assert function in defined
    _, settings, scale = from_mapping(app["args"])
    worker = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    (container,) = worker["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    assert scale.num_gpus <= float(limits["nvidia.com/gpu"])
    assert scale.num_cpus <= float(limits["cpu"])
    assert worker["minReplicas"] >= scale.replicas
    assert worker["maxReplicas"] >= scale.max_replicas
    grace = worker["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > settings.drain_seconds
    for group in groups(service):
        (container,) = group["template"]["spec"]["containers"]
        mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
        assert any(scale.api_key_file.startswith(f"{mount}/") for mount in mounts)


def test_the_manifests_pods_are_whole(service):
    tags = {
        tag for path in DOCKERFILES for tag in re.findall(r"-t (inferlab:\w+) ", path.read_text())
    }
    users = {dict(instructions(path))["USER"] for path in DOCKERFILES}
    for group in groups(service):
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert pod["securityContext"]["runAsNonRoot"]
        assert {str(pod["securityContext"]["runAsUser"])} == users
        for container in pod["containers"]:
            assert container["image"] in tags
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert container["resources"]["requests"] == container["resources"]["limits"]


def test_serve_and_manifest_agree_on_the_version_of_ray(service):
    least = re.search(r'"ray\[serve\]>=([\d.]+)"', _pyproject())[1]
    version = service["spec"]["rayClusterConfig"]["rayVersion"]
    assert version.startswith(least)


def _pyproject():
    return (ROOT / "pyproject.toml").read_text()
