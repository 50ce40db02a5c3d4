"""Help pages as plain text: readable without colour and boxes, verbs in sections, nothing to import but typer."""

from __future__ import annotations

import inspect
from typing import Any

from typer.core import TyperCommand, TyperGroup

from plmsae_cli.cli.exits import MEANINGS, USAGE, complain

FORMER = {
    "--token": "log in once with `hf auth login`, or set HF_TOKEN in the environment: arguments are seen by everybody",
    "--wandb_token": "set WANDB_API_KEY in the environment, use `wandb login`, or wait to be asked",
    "--yaml_path": "name the file itself: `plmsae run my.yaml`, or a folder of them",
}
"""Options of an earlier launcher -> what takes their place."""


class Verb(TyperCommand):
    """One verb's page: usage, what it does, arguments, options, examples."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for name in (argument.partition("=")[0] for argument in args):
            if name in FORMER:
                complain(f"there is no option {name}", FORMER[name])
                ctx.exit(USAGE)
        return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        arguments: list[Any] = [p for p in self.get_params(ctx) if p.param_type_name == "argument"]
        return ["[OPTIONS]", *(_name(p) if p.required else f"[{_name(p)}]" for p in arguments)]

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        _paragraphs(self.help or "", formatter)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        params: list[Any] = self.get_params(ctx)
        arguments = [(_name(p), _help(p)) for p in params if p.param_type_name == "argument"]
        options = [(_flags(p), _help(p)) for p in params if p.param_type_name == "option"]
        for title, rows in (("Arguments", arguments), ("Options", options)):
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        if self.epilog:
            with formatter.section("Examples"):
                for line in inspect.cleandoc(self.epilog).splitlines():
                    formatter.write(f"  {line}\n")


class Verbs(TyperGroup):
    """The first page: options, the verbs by section in the order of the file, exit codes."""

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        _paragraphs(self.help or "", formatter)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        self.format_commands(ctx, formatter)
        with formatter.section("Options"):
            formatter.write_dl([(_flags(p), _help(p)) for p in self.get_params(ctx)])

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for name, command in self.commands.items():
            first = inspect.cleandoc(command.help or "").split("\n\n")[0].replace("\n", " ")
            sections.setdefault(str(getattr(command, "rich_help_panel", "Verbs")), []).append((name, first))
        widest = max(len(name) for name in self.commands)
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(widest), text) for name, text in rows])

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), meaning) for code, meaning in MEANINGS.items()])


def _paragraphs(text: str, formatter: Any) -> None:
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(paragraph.replace("\n", " "))


def _name(argument: Any) -> str:
    return str(argument.metavar or argument.name.upper())


def _flags(option: Any) -> str:
    flags = ", ".join(sorted(option.opts, key=len))
    return flags if option.is_flag or option.metavar is None else f"{flags} {option.metavar}"


def _help(param: Any) -> str:
    if param.param_type_name == "argument" or param.is_flag or not isinstance(param.default, str):
        return str(param.help)
    return f"{param.help} [default: {param.default}]"
