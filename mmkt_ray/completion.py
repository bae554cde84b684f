"""`mmkt completion`: a script with which a shell completes commands and options."""

from __future__ import annotations

import argparse

SHELLS = ("bash", "zsh", "fish")


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script for a shell: bash, zsh or fish."""
    found = commands(parser)
    return _fish(found) if shell == "fish" else _bash(found, shell)


def commands(parser: argparse.ArgumentParser) -> dict[str, tuple[str, list[str]]]:
    """Command -> its help and its long options."""
    subparsers = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    helps = {choice.dest: choice.help or "" for choice in subparsers._choices_actions}
    return {
        name: (helps.get(name, ""), [o for a in own._actions for o in a.option_strings if o.startswith("--")])
        for name, own in subparsers.choices.items()
    }


def _bash(found: dict[str, tuple[str, list[str]]], shell: str) -> str:
    cases = "\n".join(f'    {name}) words="{" ".join(options)}" ;;' for name, (_, options) in found.items())
    start = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    use = (
        'eval "$(mmkt completion zsh)" in ~/.zshrc' if shell == "zsh" else 'eval "$(mmkt completion bash)" in ~/.bashrc'
    )
    return f"""# {use}
{start}_mmkt() {{
  local words="" word="${{COMP_WORDS[COMP_CWORD]}}"
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{" ".join(found)}" -- "$word"))
    return
  fi
  case "${{COMP_WORDS[1]}}" in
{cases}
  esac
  case "$word" in
    -*) COMPREPLY=($(compgen -W "$words" -- "$word")) ;;
    *) COMPREPLY=($(compgen -f -- "$word")) ;;
  esac
}}
complete -o filenames -F _mmkt mmkt"""


def _fish(found: dict[str, tuple[str, list[str]]]) -> str:
    lines = ["# mmkt completion fish > ~/.config/fish/completions/mmkt.fish"]
    for name, (text, options) in found.items():
        quoted = text.replace("\\", "\\\\").replace("'", "\\'")
        lines.append(f"complete -c mmkt -n __fish_use_subcommand -f -a {name} -d '{quoted}'")
        lines += [f"complete -c mmkt -n '__fish_seen_subcommand_from {name}' -l {option[2:]}" for option in options]
    return "\n".join(lines)
