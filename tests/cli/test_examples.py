"""The example in a command's help is a call that the command takes."""

from __future__ import annotations

import shlex

import pytest
import typer
from typer.testing import CliRunner

from lesionsam.cli.app import app
from lesionsam.cli.examples import EXAMPLES

GROUP = typer.main.get_command(app)


def commands() -> dict[str, object]:
    """`data check` -> the command; groups that run by themselves are left out."""
    found = {}
    for name, command in GROUP.commands.items():  # pyright: ignore
        members = getattr(command, "commands", None)
        found |= {f"{name} {sub}": each for sub, each in members.items()} if members else {name: command}
    return found


def test_every_command_has_an_example_in_its_help() -> None:
    wanted = {name for name in commands() if name != "cache clear"}
    assert wanted == set(EXAMPLES)
    for name in wanted - {"foundation"}:  # it hands --help on
        shown = CliRunner().invoke(app, [*name.split(), "--help"], terminal_width=200)
        assert f"Example: {EXAMPLES[name]}" in " ".join(shown.output.split()), name


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_taken(name: str) -> None:
    words = shlex.split(EXAMPLES[name])
    assert words[: 1 + len(name.split())] == ["lesionsam", *name.split()]
    command = commands()[name]
    context = command.make_context(name, words[1 + len(name.split()) :])  # pyright: ignore
    assert not context.args or name.startswith("submit"), "submit hands arguments on"


def test_register_is_promote_and_only_one_of_them_is_listed() -> None:
    listed = CliRunner().invoke(app, ["--help"], terminal_width=200).output
    assert "promote" in listed
    assert " register " not in listed
    assert commands()["register"].callback is commands()["promote"].callback or (  # pyright: ignore
        commands()["register"].callback.__wrapped__ is commands()["promote"].callback.__wrapped__  # pyright: ignore
    )


def test_the_four_that_check_say_what_they_are_for() -> None:
    for name, what in (
        ("check", "parameters"),
        ("data check", "data"),
        ("doctor", "installation"),
        ("smoke", "weights"),
    ):
        shown = CliRunner().invoke(app, [*name.split(), "--help"], terminal_width=200).output.lower()
        assert f"for {what}" in shown or f"for the {what}" in shown, name
