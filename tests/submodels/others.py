"""What others do to a family meanwhile: another thread inside a block, and weights that are exchanged."""

import threading
from contextlib import contextmanager

import torch


@contextmanager
def another_thread(inside):
    """Another thread that is inside a context manager meanwhile."""
    entered, leave = threading.Event(), threading.Event()

    def run():
        with inside():
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=run, name="other")
    thread.start()
    assert entered.wait(60)
    try:
        yield
    finally:
        leave.set()
        thread.join()


def exchange(model, change):
    """Other weights than those that sizes of the model were made of: other tensors, other memory in them, or another module."""
    if change == "assign":
        model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()}, assign=True)
    elif change == "data":
        for parameter in model.parameters():
            parameter.data = parameter.data * 2
    else:
        assert change == "module"
        model.lm_head = torch.nn.Linear(48, 64, bias=False)
