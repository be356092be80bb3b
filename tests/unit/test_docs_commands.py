"""Commands in the docs that are not psyray's own: each is read by the program's parser, or against what it acts on."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import jsonschema
import pytest
import yaml

from serve.access import read_keys
from serve.ingress import description

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
WORDS_BEFORE = re.compile(r"^(?:\$ )?(?:\w+=\S* )*")
OPERATORS = {"|", "&&", ";", ">"}


def commands(*begins: str) -> list[list[str]]:
    """The words of each command in the docs that begins so: in a block of code, or alone between backticks."""
    found = dict[tuple[str, ...], None]()
    for page in PAGES:
        text = page.read_text()
        blocks = [block.replace("\\\n", " ") for block in FENCED.findall(text)]
        spans = re.findall(r"`([^`]+)`", FENCED.sub("", text))
        for line in (*(line for block in blocks for line in block.splitlines()), *spans):
            bare = WORDS_BEFORE.sub("", line.strip())
            if any(begin in bare for begin in begins):
                found.update(dict.fromkeys(call for call in calls(bare) if " ".join(call).startswith(begins)))
    return [list(words) for words in found]


def calls(line: str) -> list[tuple[str, ...]]:
    """The commands of a line of shell, each as its words."""
    parts: list[list[str]] = [[]]
    reader = shlex.shlex(line, posix=True, punctuation_chars="|&;>")
    reader.whitespace_split = True
    for word in reader:
        if word in OPERATORS:
            parts.append([])
        else:
            parts[-1].append(word)
    return [tuple(part) for part in parts if part]


def shown(words: list[str]) -> str:
    return " ".join(words)[:60]


def test_a_line_of_shell_is_cut_into_its_commands():
    line = "sed s,A,B:0.1, a.yaml | kubectl apply -n x -f - && make demo X='a | b'   # said"
    assert calls(line) == [
        ("sed", "s,A,B:0.1,", "a.yaml"), ("kubectl", "apply", "-n", "x", "-f", "-"), ("make", "demo", "X=a | b"),
    ]  # fmt: skip


SERVED_FILES = sorted({words[2] for words in commands("serve run ", "serve deploy ") if words[2].endswith(".yaml")})


@pytest.mark.parametrize("name", SERVED_FILES)
def test_every_file_that_the_docs_serve_is_one_that_serve_takes(name):
    from ray.serve.schema import ServeDeploySchema

    text = (ROOT / name).read_text()
    # The applications that stand there as comments are to be filled in: they have to be right as well.
    tree = yaml.safe_load(re.sub(r"^  # (- name:|  )", r"  \1", text, flags=re.MULTILINE))
    assert len(tree["applications"]) > len(yaml.safe_load(text)["applications"])
    ServeDeploySchema.model_validate(tree)
    for application in tree["applications"]:
        module, build = application["import_path"].split(":")
        served = import_module(module)
        assert callable(getattr(served, build))
        served.Args.read(application["args"])


@pytest.mark.parametrize("words", commands("kubectl apply "), ids=shown)
def test_every_manifest_that_the_docs_apply_is_there(words):
    name = words[words.index("-f") + 1]
    assert name == "-" or objects(name)


@pytest.mark.parametrize("words", commands("sed "), ids=shown)
def test_what_the_docs_replace_in_a_manifest_stands_in_it(words):
    what, name = words[1].split(",")[1], words[2]
    assert what in (ROOT / name).read_text() and objects(name)


def objects(name: str) -> list[dict[str, Any]]:
    found = list(yaml.safe_load_all((ROOT / name).read_text()))
    assert all({"apiVersion", "kind", "metadata"} <= set(one) for one in found)
    return found


@pytest.mark.parametrize("words", commands("make "), ids=shown)
def test_every_make_target_in_the_docs_is_one(words):
    makefile = (ROOT / "Makefile").read_text()
    for word in words[1:]:
        name, given, _ = word.partition("=")
        there = rf"\$\({name}\)" if given else rf"^{re.escape(name)}:"
        assert re.search(there, makefile, re.MULTILINE), word


@pytest.mark.parametrize("words", commands("curl "), ids=shown)
def test_every_request_in_the_docs_is_one_that_the_port_takes(words):
    curl = argparse.ArgumentParser(exit_on_error=False)
    curl.add_argument("url")
    curl.add_argument("-s", action="store_true")
    curl.add_argument("-H", action="append", default=[])
    curl.add_argument("-d")
    asked, port = curl.parse_args(words[1:]), description()
    operation = port["paths"][urlsplit(f"http://{asked.url}").path]["post" if asked.d else "get"]
    if asked.d:
        assert "Content-Type: application/json" in asked.H
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        jsonschema.validate(json.loads(asked.d), schema | {"components": port["components"]})
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"speech": "x"}, schema | {"components": port["components"]})


@pytest.mark.parametrize("words", commands("mlflow "), ids=shown)
def test_every_mlflow_command_in_the_docs_is_one(words):
    from mlflow.cli import cli

    given = cli.commands[words[1]].make_context("mlflow", words[2:]).params
    assert given["backend_store_uri"].startswith("postgresql+psycopg://") and ":" in given["allowed_hosts"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_lines_of_keys_that_the_docs_write_are_read(page, tmp_path):
    lines = [line for block in FENCED.findall(page.read_text()) for line in block.splitlines() if ">> keys" in line]
    script = "\n".join(lines).replace("$(openssl rand -hex 24)", "$RANDOM-a-token-long-enough-$RANDOM")
    subprocess.run(["bash", "-euc", script], cwd=tmp_path, check=True)
    if lines:
        assert len(read_keys(tmp_path / "keys")) >= len(lines)


def test_the_secrets_that_the_docs_make_are_those_that_the_manifests_name():
    made = {words[4] for words in commands("kubectl create secret ")}
    texts = [path.read_text() for path in (ROOT / "configs/kuberay").glob("ray*.yaml")]
    assert made == {name for text in texts for name in re.findall(r"secret(?:Name|Ref: {name): ([\w-]+)", text)}


def test_the_services_that_the_docs_reach_are_those_that_the_operator_makes():
    """KubeRay names them by the object."""
    paths = sorted((ROOT / "configs/kuberay").glob("ray*.yaml"))
    names = {one["kind"]: one["metadata"]["name"] for path in paths for one in objects(f"configs/kuberay/{path.name}")}
    there = {f"{names['RayCluster']}-head-svc", f"{names['RayService']}-serve-svc"}
    assert {name for page in PAGES for name in re.findall(r"[\w-]+-svc", page.read_text())} == there


def test_the_image_that_the_docs_build_and_push_is_the_one_that_the_pods_get():
    [build], [push] = commands("docker build "), commands("docker push ")
    image = build[build.index("-t") + 1]
    assert (ROOT / build[build.index("-f") + 1]).is_file() and push[2] == image
    assert {words[1].split(",")[2] for words in commands("sed ")} == {image}


@pytest.mark.parametrize("words", commands("pip install "), ids=shown)
def test_every_extra_in_the_docs_is_one(words):
    name, extra = re.fullmatch(r"(\w+)\[(\w+)\]", words[2]).groups()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == name and extra in project["optional-dependencies"]


@pytest.mark.parametrize("words", commands("ray ", "serve "), ids=shown)
def test_every_command_of_rays_own_is_one(words):
    """Its flags are read in test_cli.py where it stands in a block of code."""
    module = import_module({"ray": "ray.scripts.scripts", "serve": "ray.serve.scripts"}[words[0]])
    command: click.Command = module.cli
    for word in words[1:]:
        if not isinstance(command, click.Group):
            break
        assert word in command.commands
        command = command.commands[word]


READ = ("psyray", "ray", "serve", "make", "curl", "mlflow", "kubectl", "sed", "docker", "pip", "python", "echo")
OTHERS = ("export", "umask", "for", "helm", ".")  # the shell's own; a chart of somebody else's


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_command_in_the_docs_is_read_by_nobody(page):
    text = page.read_text().replace("\\\n", " ")
    for language, block in re.findall(r"^```([^\n]*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in filter(None, () if language else block.splitlines()):
            program = WORDS_BEFORE.sub("", line.strip()).split()[0]
            assert program in READ or program in OTHERS or WORDS_BEFORE.fullmatch(f"{line} "), line


def test_the_docs_have_commands_of_each_kind():
    kinds = ("kubectl apply ", "sed ", "make ", "curl ", "mlflow ", "pip install ", "ray ", "serve ")
    assert SERVED_FILES and all(commands(kind) for kind in kinds)
