"""compose.yaml, its Dockerfile and .env.example: what they promise, checked without a Docker daemon."""

import asyncio
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from ruamel.yaml import YAML

from fastchat_q import keys
from fastchat_q.connection import connect
from fastchat_q.embedded import durability_findings, server_binary
from fastchat_q.registry import ModelCard, Registration, Registry
from fastchat_q.settings import Settings

from .servers import RedisServer

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "compose.yaml").read_text()
EXAMPLE = (ROOT / ".env.example").read_text()
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
VARIABLE = re.compile(r"\$\{(\w+):-([^}]*)\}")

# As Compose sees the file when no variable is set.
COMPOSE: dict[str, Any] = YAML(typ="safe", pure=True).load(VARIABLE.sub(r"\2", TEXT))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = [name for name in SERVICES if name != "redis"]

every_service = pytest.mark.parametrize("name", SERVICES)


def clean_environment(**more: str) -> dict[str, str]:
    """This process's environment without what compose.yaml or Compose itself would read."""
    theirs = ("FASTCHAT_Q_", "COMPOSE_", "HF_")
    return {**{name: value for name, value in os.environ.items() if not name.startswith(theirs)}, **more}


def seconds(duration: str) -> float:
    """A Compose duration of one unit."""
    return float(duration[:-1]) * {"s": 1, "m": 60}[duration[-1]]


def stages() -> dict[str, list[str]]:
    """The Dockerfile's instructions by stage, continuation lines joined."""
    found: dict[str, list[str]] = {}
    lines = [line for line in DOCKERFILE.splitlines() if line and not line.startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.startswith("FROM"):
            found[line.split()[-1]] = []
        if found:
            list(found.values())[-1].append(line)
    return found


def instructions(stage: str, name: str) -> list[str]:
    """Arguments of the instructions called ``name`` in a stage and in those it is built from."""
    lines = stages()[stage]
    parent = lines[0].split()[1]
    inherited = instructions(parent, name) if parent in stages() else []
    return inherited + [line.removeprefix(name).strip() for line in lines if line.startswith(f"{name} ")]


def test_the_file_fits_the_compose_specification() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", "compose.yaml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("profiles", [[], ["--profile", "*"]], ids=["default", "all profiles"])
def test_docker_compose_accepts_the_file_and_the_example(profiles: list[str]) -> None:
    require_compose_plugin()
    command = ["docker", "compose", "--env-file", ".env.example", *profiles, "config", "--quiet"]
    done = subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not done.stderr


def require_compose_plugin() -> None:
    """Skips on a laptop without Compose; where FASTCHAT_Q_REQUIRE_COMPOSE=1, as in CI, that is a failure."""
    try:
        missing = subprocess.run(["docker", "compose", "version"], capture_output=True, timeout=60).returncode != 0
    except FileNotFoundError:
        missing = True
    if missing and os.environ.get("FASTCHAT_Q_REQUIRE_COMPOSE") == "1":
        pytest.fail("docker compose is missing, and FASTCHAT_Q_REQUIRE_COMPOSE=1 asks for it: run .ci/compose-plugin")
    if missing:
        pytest.skip("docker compose is not installed: run .ci/compose-plugin")


def test_a_plain_up_starts_a_working_chat_and_nothing_more() -> None:
    default = {name for name, service in SERVICES.items() if "profiles" not in service}
    assert default == {"redis", "api", "orchestrator", "worker"}
    assert SERVICES["worker"]["command"] == ["worker", "--models", "tiny", "--device", "cpu"]


def test_a_gpu_is_asked_for_only_behind_its_profile() -> None:
    with_gpu = [name for name, service in SERVICES.items() if "nvidia" in str(service.get("deploy"))]
    assert with_gpu == ["worker-gpu"]
    assert SERVICES["worker-gpu"]["profiles"] == ["gpu"]
    assert SERVICES["worker-gpu"]["command"][-2:] == ["--device", "cuda"]


def test_no_variable_can_stop_a_start() -> None:
    assert TEXT.count("$") == len(VARIABLE.findall(TEXT))


def test_the_example_names_every_variable_with_its_default() -> None:
    example = dict(re.findall(r"^#(\w+)=(.*)$", EXAMPLE, re.MULTILINE))
    assert example.pop("COMPOSE_PROFILES") == ""
    assert example == dict(VARIABLE.findall(TEXT))


def test_a_variable_has_one_default_wherever_it_is_read() -> None:
    assert len(set(VARIABLE.findall(TEXT))) == len({name for name, _ in VARIABLE.findall(TEXT)})


@pytest.mark.parametrize("name", OURS)
def test_the_programs_know_every_setting_that_they_are_handed(name: str) -> None:
    settings = {f"FASTCHAT_Q_{field.upper()}" for field in Settings.model_fields}
    handed = {variable for variable in SERVICES[name]["environment"] if variable.startswith("FASTCHAT_Q_")}
    assert "FASTCHAT_Q_REDIS_URL" in handed
    assert handed <= settings


@every_service
def test_a_container_has_no_more_rights_than_it_needs(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["tmpfs"]
    assert "privileged" not in service
    assert "cap_add" not in service


def test_only_the_api_is_published_and_only_on_loopback() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {"api": ["127.0.0.1:8000:8000"]}
    assert not [name for name, service in SERVICES.items() if "network_mode" in service]


@every_service
def test_every_image_has_a_fixed_tag(name: str) -> None:
    _, _, tag = SERVICES[name]["image"].rpartition("/")[-1].partition(":")
    assert re.match(r"\d+\.\d+", tag), SERVICES[name]["image"]


@pytest.mark.parametrize("name", OURS)
def test_our_images_carry_the_version_of_the_package(name: str) -> None:
    version = PROJECT["project"]["version"]
    assert SERVICES[name]["image"].startswith(f"fastchat-q:{version}")
    assert SERVICES[name].get("build", {}).get("args", {}).get("VERSION", version) == version
    assert instructions("runtime", "ARG") == [f"VERSION={version}"]


@every_service
def test_every_service_has_a_health_check(name: str) -> None:
    assert {"test", "interval", "timeout", "retries", "start_period"} == set(SERVICES[name]["healthcheck"])


@every_service
def test_every_dependency_waits_for_health(name: str) -> None:
    for other, how in SERVICES[name].get("depends_on", {}).items():
        assert how == {"condition": "service_healthy"}
        assert "profiles" not in SERVICES[other]


def test_nobody_waits_for_a_worker() -> None:
    assert {other for service in SERVICES.values() for other in service.get("depends_on", {})} == {"redis"}
    assert "/healthz" in SERVICES["api"]["healthcheck"]["test"][-1]


@every_service
def test_a_container_comes_back_and_has_the_time_to_drain(name: str) -> None:
    service = SERVICES[name]
    assert service["restart"] == "unless-stopped"
    assert service["init"] is True
    hand_back_s = 5.0
    assert seconds(service["stop_grace_period"]) > Settings.model_fields["drain_s"].default + hand_back_s


@every_service
def test_logs_are_rotated(name: str) -> None:
    assert set(SERVICES[name]["logging"]["options"]) == {"max-size", "max-file"}


async def is_healthy(service: str, redis_url: str) -> bool:
    """Runs a service's health check here, as its container would."""
    kind, python, *arguments = SERVICES[service]["healthcheck"]["test"]
    assert (kind, python) == ("CMD", "python")
    environment = clean_environment(FASTCHAT_Q_REDIS_URL=redis_url)
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, env=environment, stderr=asyncio.subprocess.PIPE
    )
    _, errors = await process.communicate()
    assert process.returncode == 0 or b"not in the registry" in errors or b"no health line" in errors, errors
    return process.returncode == 0


async def test_a_worker_is_healthy_when_its_container_is_in_the_registry(
    redis: "Redis", redis_server: RedisServer
) -> None:
    registry, card = Registry(redis), ModelCard(name="tiny", engine="echo", context_length=None, created=0)
    assert not await is_healthy("worker", redis_server.url)
    elsewhere = Registration("w-elsewhere", card, 1, 0, "serving", "elsewhere", 1, "0", 0)
    await registry.announce(elsewhere)
    assert not await is_healthy("worker", redis_server.url)
    await registry.announce(Registration.of_this_process("w-here", card, 1))
    assert await is_healthy("worker", redis_server.url)


async def test_the_orchestrator_is_healthy_while_its_health_line_is_there(
    redis: "Redis", redis_server: RedisServer
) -> None:
    assert not await is_healthy("orchestrator", redis_server.url)
    await redis.set(keys.ORCHESTRATOR_HEALTH, "j_complete=0", ex=15)
    assert await is_healthy("orchestrator", redis_server.url)


@pytest.fixture
async def composed_redis(folder: Path) -> AsyncIterator["Redis"]:
    """A client of a server with the options in compose.yaml, but for a unix socket and a folder of its own."""
    where = ["--port", "0", "--unixsocket", str(folder / "r.sock"), "--dir", str(folder)]
    assert SERVICES["redis"]["entrypoint"] == ["redis-server"]
    process = await asyncio.create_subprocess_exec(
        server_binary(), *SERVICES["redis"]["command"], *where, stdout=asyncio.subprocess.DEVNULL
    )
    client = connect(f"unix://{folder / 'r.sock'}")
    try:
        async with asyncio.timeout(30):
            while not (folder / "r.sock").exists():
                assert process.returncode is None, "the server does not accept these options"
                await asyncio.sleep(0.01)
        yield client
    finally:
        await client.aclose()
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_redis_keeps_what_it_accepted_and_refuses_rather_than_evicts(composed_redis: "Redis") -> None:
    config = await composed_redis.config_get("*")
    assert config["appendonly"] == "yes"
    assert config["appendfsync"] == "everysec"
    assert config["maxmemory-policy"] == "noeviction"
    assert await durability_findings(composed_redis) == []


async def test_redis_lets_a_slow_reader_of_tokens_fall_behind_only_so_far(composed_redis: "Redis") -> None:
    config = await composed_redis.config_get("client-output-buffer-limit")
    assert config["client-output-buffer-limit"].endswith(f"pubsub {64 * 2**20} {16 * 2**20} 30")


def test_the_data_outlives_its_containers() -> None:
    mounted = {name: service["volumes"] for name, service in SERVICES.items() if "volumes" in service}
    assert mounted == {
        "redis": ["redis-data:/data"],
        "api": ["state:/state", "files:/files"],
        "orchestrator": ["files:/files"],
        "worker": ["models:/models"],
        "worker-gpu": ["models:/models"],
    }
    assert set(COMPOSE["volumes"]) == {"redis-data", "state", "files", "models"}


def test_the_api_and_the_orchestrator_share_the_files() -> None:
    assert SERVICES["api"]["environment"]["FASTCHAT_Q_STORAGE_URL"] == "file:///files"
    assert SERVICES["orchestrator"]["environment"]["FASTCHAT_Q_STORAGE_URL"] == "file:///files"
    assert "FASTCHAT_Q_STORAGE_URL" not in SERVICES["worker"]["environment"]


@pytest.mark.parametrize("target", ["api", "worker"])
def test_an_image_runs_as_a_numeric_user_that_is_not_root(target: str) -> None:
    user, group = instructions(target, "USER")[-1].split(":")
    assert int(user) > 0
    assert int(group) > 0
    assert re.search(rf"--owner={user} --group={group} .*/state /files /models", instructions(target, "RUN")[0])


def test_redis_runs_as_a_numeric_user_that_is_not_root() -> None:
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", SERVICES["redis"]["user"])


def test_every_base_image_has_a_fixed_tag() -> None:
    bases = {lines[0].split()[1] for lines in stages().values()} - set(stages())
    assert bases == {"${PYTHON_IMAGE}"}
    assert re.search(r"^ARG PYTHON_IMAGE=python:\d+\.\d+-slim-\w+$", DOCKERFILE, re.MULTILINE)


def test_compose_builds_what_the_dockerfile_has() -> None:
    for service in SERVICES.values():
        build = service.get("build", {"target": "api", "args": {}})
        arguments = {line.partition("=")[0] for stage in stages() for line in instructions(stage, "ARG")}
        assert build["target"] in stages()
        assert set(build["args"]) <= arguments


def test_each_of_our_images_is_built_by_one_service() -> None:
    built = [service["image"] for service in SERVICES.values() if "build" in service]
    assert sorted(built) == sorted({SERVICES[name]["image"] for name in OURS})


def test_the_build_context_is_what_the_dockerfile_copies() -> None:
    copied = {
        source.rstrip("/")
        for stage in stages()
        for line in instructions(stage, "COPY")
        if not line.startswith("--from")
        for source in line.split()[:-1]
    }
    ignore = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert ignore[0] == "*"
    assert {line.strip("!/") for line in ignore if line.startswith("!")} == copied
    packaged = {folder.split("/")[0] for folder in PROJECT["tool"]["setuptools"]["package-dir"].values()}
    assert packaged <= copied
