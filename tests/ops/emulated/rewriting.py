"""What is not C++ in CUDA's language, rewritten as calls of device.h, line by line; anything unknown is an error."""

from __future__ import annotations

import re

KNOWN = {"__global__", "__device__", "__restrict__", "__syncthreads", "__trap", "__shfl_xor_sync"}
KNOWN |= {"__half", "__nv_bfloat16"}
"""Names to which `include/` or the host's compiler gives a meaning."""

_COMMENT_OR_STRING = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.DOTALL)
_SHARED = re.compile(r"__shared__\s+([A-Za-z_]\w*)\s+([A-Za-z_]\w*)((?:\[[^\]\n]+\])+);")
_CALLEE = re.compile(r"[A-Za-z_]\w*(?:(?:\.|::)[A-Za-z_]\w*)*(?:<[\w\s,:]*>)?(?=\s*$)")


class NotUnderstood(ValueError):
    """The source has CUDA that this module does not know."""


def rewritten(text: str, name: str) -> str:
    """The text of one source as C++, with a `#line` for messages to name its lines."""
    text = _COMMENT_OR_STRING.sub(_without_comment, text)
    text = _SHARED.sub(_shared, text)
    text = _kernels(text, name)
    text = _launches(text, name)
    for found in re.finditer(r"\b__\w+|<<<|>>>", text):
        if found[0] not in KNOWN:
            raise NotUnderstood(f"{_place(text, found.start(), name)}: {found[0]} has no meaning in the emulation")
    return f'#line 1 "{name}"\n{text}'


def _without_comment(found: re.Match[str]) -> str:
    return found[0] if found[0].startswith('"') else re.sub(r"[^\n]", " ", found[0])


def _shared(found: re.Match[str]) -> str:
    """A variable of its own for every instantiation of the function, whose address is the key to the memory."""
    kind, name, sizes = found.groups()
    return (
        f"static char {name}_key; auto& {name} = *static_cast<{kind}(*){sizes}>("
        f"emulated::shared(&{name}_key, sizeof({kind}{sizes}), alignof({kind})));"
    )


def _kernels(text: str, name: str) -> str:
    """Every kernel begins by saying that it runs, and with how many threads it may."""
    done, rest = "", text
    while (start := rest.find("__global__")) >= 0:
        signature = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\s*\()?").match(rest, start)
        if signature is None:
            raise NotUnderstood(f"{name}: `__global__ void` begins a kernel; got {rest[start : start + 60]!r}")
        head, most, place = rest[: signature.end()], "1024", signature.end()
        if head.endswith("("):
            end = _closing(rest, place - 1, name)
            most = _split(rest[place:end])[0]
            head = rest[:start] + "__global__ void " + "\n" * rest.count("\n", signature.start(), end)
            place = end + 1
        named = re.compile(r"\s*\w+\s*\(").match(rest, place)
        if named is None:
            raise NotUnderstood(f"{name}: a kernel has a name; got {rest[place : place + 60]!r}")
        brace = _closing(rest, named.end() - 1, name) + 1
        brace += len(rest[brace:]) - len(rest[brace:].lstrip())
        if rest[brace] != "{":
            raise NotUnderstood(f"{name}: a kernel is defined where it is declared; got {rest[brace : brace + 60]!r}")
        done += head + rest[place:brace] + f"{{ emulated::enter({most.strip()});"
        rest = rest[brace + 1 :]
    return done + rest


def _launches(text: str, name: str) -> str:
    """kernel<<<grid, block, shared, stream>>>(...) becomes a call of what `emulated::launch` returns."""
    while (start := text.find("<<<")) >= 0:
        callee = _CALLEE.search(text[:start])
        end = text.find(">>>", start)
        if callee is None or end < 0:
            raise NotUnderstood(f"{_place(text, start, name)}: a launch is a kernel's name, <<<, four numbers and >>>")
        settings = _split(text[start + 3 : end])
        if len(settings) != 4 or not text[end + 3 :].lstrip().startswith("("):
            raise NotUnderstood(f"{_place(text, start, name)}: a launch has grid, block, shared memory and stream")
        between = text[callee.end() : start]
        call = f"emulated::launch({', '.join(settings)}, [=](auto... given) {{ {callee[0]}(given...); }})"
        text = text[: callee.start()] + call + between + text[end + 3 :]
    return text


def _closing(text: str, opening: int, name: str) -> int:
    """Where the parenthesis that opens here is closed."""
    depth = 0
    for place in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    raise NotUnderstood(f"{_place(text, opening, name)}: a parenthesis is not closed")


def _split(text: str) -> list[str]:
    """At commas outside of brackets; those of templates count as brackets where they hold types or numbers only."""
    parts, depth = [""], 0
    for character in re.sub(r"<[\w\s,:]*>", lambda found: found[0].replace(",", "\0"), text):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character.replace("\0", ",")
    return [part.strip() for part in parts]


def _place(text: str, position: int, name: str) -> str:
    return f"{name}:{text.count(chr(10), 0, position) + 1}"
