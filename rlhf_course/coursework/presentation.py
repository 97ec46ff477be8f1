"""How a check looks: a table in a notebook, plain lines in a terminal."""

from __future__ import annotations

import sys
from html import escape
from typing import Any

import torch

from rlhf_course.coursework.checked import Checked, raised_at
from rlhf_course.coursework.trial import Outcome

GOOD, BAD, LATER = "✓", "✗", "·"
LONGEST = 400  # characters of one shown value
NUMBERS = 60  # of a tensor that is shown whole

STYLE = {GOOD: "color:#00735A", BAD: "color:#B3400A;font-weight:bold", LATER: "color:#767676"}


def words(value: Any) -> str:
    """A value as a student wants to read it: few digits, nothing endless."""
    if isinstance(value, torch.Tensor):
        return _tensor(value)
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {words(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        left, right = "()" if isinstance(value, tuple) else "[]"
        return _short(left + ", ".join(map(words, value)) + right)
    return _short(str(value))


def _tensor(value: torch.Tensor) -> str:
    value = value.detach().cpu()
    kind = str(value.dtype).removeprefix("torch.")
    if value.numel() > NUMBERS:
        return f"a {kind} tensor of shape {tuple(value.shape)}"
    if value.dim() == 0:
        return words(value.item())
    return f"{_nested(value.tolist())} ({kind})"


def _nested(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_nested, value)) + "]"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST] + " …"


def mark(outcome: Outcome) -> str:
    """One sign: right, wrong, not written yet."""
    return GOOD if outcome.passed else LATER if outcome.missing else BAD


def headline(result: Checked) -> str:
    """One line that says how it went."""
    exercise, total = result.exercise, len(result.outcomes)
    if result:
        return f"{exercise.qualname}: all {total} properties hold. Well done."
    if result.missing and not result.right:
        return (
            f"{exercise.qualname} is not written yet. Replace `raise NotImplementedError` by your "
            "code; the hints below it help."
        )
    return f"{exercise.qualname}: {result.right} of {total} properties hold."


def details(result: Checked) -> list[tuple[str, str]]:
    """(label, text) of the first failure, the known mistake last."""
    first = result.first
    if first is None:
        return []
    wrong = first.mismatch
    rows = [(first.title, f"{wrong.what.strip()}.")]
    rows += [(name, words(value)) for name, value in wrong.inputs.items()]
    rows += [("expected", words(wrong.expected)), ("got", words(wrong.got))]
    if where := raised_at(first):
        rows.append(("raised at", where))
    if result.mistake is not None:
        rows.append(("looks like", result.mistake.says))
    return rows


def as_text(result: Checked) -> str:
    """For a terminal."""
    lines = [headline(result)]
    if not (result.missing and result.first is None):
        lines += [f"  {mark(outcome)} {outcome.title}" for outcome in result.outcomes]
    for number, (label, text) in enumerate(details(result)):
        lines.append(f"\n  {label}: {text}" if number == 0 else f"    {label:12} {text}")
    return "\n".join(lines)


def as_html(result: Checked) -> str:
    """For a notebook."""
    lines = [f"<b>{escape(headline(result))}</b>"]
    if not (result.missing and result.first is None):
        lines += [
            f'<div style="{STYLE[mark(o)]}">{mark(o)} {escape(o.title)}</div>'
            for o in result.outcomes
        ]
    for number, (label, text) in enumerate(details(result)):
        if number == 0:
            lines.append(f'<div style="margin-top:.6em"><i>{escape(label)}</i>: {escape(text)}')
            lines.append("</div><table>")
            continue
        style = "text-align:left;vertical-align:top;padding:0 1em 0 0"
        value = (
            f"<b>{escape(text)}</b>" if label == "looks like" else f"<code>{escape(text)}</code>"
        )
        lines.append(
            f'<tr><td style="{style}">{escape(label)}</td>'
            f'<td style="text-align:left">{value}</td></tr>'
        )
    if result.first is not None:
        lines.append("</table>")
    return "\n".join(lines)


def show(result: Checked) -> None:
    """Display it: as a table in Jupyter and Colab, as plain text everywhere else."""
    if not in_notebook():
        print(_printable(as_text(result)))
        return
    from IPython.display import display

    display({"text/html": as_html(result), "text/plain": as_text(result)}, raw=True)


def _printable(text: str) -> str:
    """The text as far as the terminal's encoding goes: older ones of Windows have no ✓."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = text.translate(str.maketrans({GOOD: "+", BAD: "x", LATER: "-"}))
    return text.encode(encoding, "replace").decode(encoding)


def in_notebook() -> bool:
    """True in a kernel whose front end can draw HTML."""
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    shell = get_ipython()
    return shell is not None and getattr(shell, "kernel", None) is not None
