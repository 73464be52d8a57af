"""Moves every control of a notebook's widgets, one at a time: a test runs this in the notebook's kernel, after its last cell.

It prints a JSON list of faults, one sentence each. A slider goes to both ends, a list to each of its options, a text to others,
a button is clicked; each has to call its function once, without an exception, and something has to come of it.
"""

import gc
import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout

from IPython import get_ipython


@contextmanager
def shown() -> Iterator[list]:
    "What is displayed or printed meanwhile, and does not reach the page."
    displayed, printed, publisher = [], io.StringIO(), get_ipython().display_pub
    hook = lambda message: (
        displayed.append(message["content"]["data"]) if "data" in message["content"] else message
    )
    publisher.register_hook(hook)
    try:
        with redirect_stdout(printed):
            yield displayed
    finally:
        publisher.unregister_hook(hook)
        displayed += printed.getvalue().splitlines()


def other_values(control: object) -> list | None:
    "What a control can be set to, its value of now aside; None where nobody has said that here."
    import ipywidgets as widgets

    if isinstance(control, widgets.Text | widgets.Textarea):
        values = ["", "Zürich – 東京, and so\nit goes"]
    elif hasattr(control, "options"):
        values = [value for _, value in control._options_full]
    elif hasattr(control, "min"):
        values = [control.min, control.max]
    elif isinstance(control.value, bool):
        values = [not control.value]
    else:
        return None
    return [value for value in values if value != control.value]


def moves(control: object) -> Iterator[tuple[str, Callable[[], None]]]:
    "Each thing that a reader can do with a control: (what, do it). The value comes back after each."
    if hasattr(control, "click"):
        yield "is clicked", control.click
    else:
        first = control.value
        for value in other_values(control):
            for goal in (value, first):
                yield f"is set to {goal!r}", lambda goal=goal: setattr(control, "value", goal)


def watch(group: object) -> list[str | None]:
    "The calls of the function of some controls from now on, and what it raised: ipywidgets shows that in the page, and goes on."
    calls, function = [], group.f

    def watched(**values: object) -> object:
        calls.append(None)
        try:
            return function(**values)
        except Exception as error:
            calls[-1] = f"{type(error).__name__}: {error}"
            raise

    group.f = watched
    return calls


def faults_of(control: object, calls: list[str | None], wanted: int | None) -> Iterator[str]:
    "What is wrong with a control: it is to call the function `wanted` times when it is moved, if there is one, and something has to be shown."
    name = f"{type(control).__name__} {control.description!r}"
    if getattr(control, "continuous_update", False):
        yield f"{name} calls its function while it moves, and not once after."
    if control.description and getattr(control.style, "description_width", "initial") != "initial":
        yield f"{name} may be cut off."
    if not hasattr(control, "click") and other_values(control) is None:
        yield f"tests/controls.py does not know how to move {name}."
        return
    for what, move in moves(control):
        calls.clear()
        with shown() as said:
            move()
        if wanted is not None and len(calls) != wanted:
            yield f"{name} {what}: its function is called {len(calls)} times, and not {wanted}."
        elif any(calls):
            yield f"{name} {what}: {calls[0]}"
        elif wanted != 0 and not said:
            yield f"{name} {what}: nothing is shown."


def faults() -> Iterator[str]:
    import ipywidgets as widgets

    alive = [
        thing
        for thing in gc.get_objects()
        if issubclass(type(thing), widgets.Widget) and thing.comm is not None
    ]
    groups = [thing for thing in alive if isinstance(thing, widgets.interactive)]
    for group in groups:
        calls = watch(group)
        for control in group.kwargs_widgets:
            yield from faults_of(control, calls, 0 if group.manual else 1)
        if group.manual:
            yield from faults_of(group.manual_button, calls, 1)
    grouped = {id(control) for group in groups for control in group.children}
    for control in alive:
        if (
            isinstance(control, widgets.Button | widgets.ValueWidget)
            and id(control) not in grouped
            and not isinstance(control, widgets.HTML | widgets.Label)
        ):
            yield from faults_of(control, [], None)


print(json.dumps(list(faults()) if "ipywidgets" in sys.modules else []))
