"""The upstream gradient that a loss's forward assumes: losses of one program that are scaled differently, gradient
accumulation, streams and CUDA graphs. With the interpreter: what a graph would replay is launched again."""

import threading

import pytest
import torch

pytest.importorskip("triton")
from asked import triton as operations

from fastdiff.backends.triton import interpreted, launch, workspace
from fastdiff.backends.triton.loss import loss as kernel
from fastdiff.tensors import Gathered

if not interpreted():
    pytest.skip("needs Triton's interpreter", allow_module_level=True)
CPU = torch.device("cpu")
RESULT = kernel.runtime.index("result")
N, ONE = torch.linspace(-1, 1, 128).view(2, 64), torch.ones(2, 1)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    for name in ("_cells", "_reserved", "_workspaces"):
        monkeypatch.setattr(workspace, name, {})


@pytest.fixture
def stream(monkeypatch):
    """Says which stream is current, and whether it is captured."""
    now = {"stream": 1, "capturing": False}
    monkeypatch.setattr(workspace, "current_stream", lambda device: now["stream"])
    monkeypatch.setattr(workspace, "is_capturing", lambda device: now["capturing"])
    return now


def prediction(shape=(2, 64)):
    return torch.randn(shape).requires_grad_()


def loss(x, weight=ONE, function="mse"):
    return operations.loss(x, None, N[:, : x.shape[1]], None, ONE, None, weight, None, None, function, "none", "mean")


def poisoned(*losses):
    """What the forwards have written, overwritten: it comes out where a backward leaves it as it is."""
    for one in losses:
        one.grad_fn.written[0].fill_(77.0)


def kept(gradient):
    """Whether a backward found the gradient there. If not, it must have computed all of it."""
    found = gradient == 77.0
    assert bool(found.all()) or not bool(found.any())
    return bool(found.all())


def grad(outputs, x, **how):
    return torch.autograd.grad(outputs, x, **how)


def expected(x, factor):
    return factor * 2 * (x - N[:, : x.shape[1]]).detach() / x.numel()


def rounds(step, number=4):
    """For each round, whether its gradients were there. ``step(poison)`` gives the gradients and what they should be;
    they are compared in a round of their own, as nothing may be poisoned for that."""
    found = []
    for _ in range(number):
        found.append([kept(got) for got, _ in step(True)])
        for got, want in step(False):
            torch.testing.assert_close(got, want)
    return found


def test_two_losses_in_one_backward():
    def step(poison):
        a, b = prediction(), prediction()
        first, second = loss(a), loss(b)
        if poison:
            poisoned(first, second)
        return zip(grad(first + 0.5 * second, (a, b)), (expected(a, 1.0), expected(b, 0.5)))

    assert rounds(step) == [[True, False]] + [[True, True]] * 3


@pytest.mark.parametrize("backwards", ["in the same order", "in reverse"])
def test_two_losses_in_two_backwards(backwards):
    def step(poison):
        a, b = prediction(), prediction()
        first, second = loss(a), loss(b)
        if poison:
            poisoned(first, second)
        calls = [(0.25 * first, a), (3.0 * second, b)]
        got = [grad(*call)[0] for call in (calls if backwards == "in the same order" else calls[::-1])]
        return zip(got if backwards == "in the same order" else got[::-1], (expected(a, 0.25), expected(b, 3.0)))

    assert rounds(step) == [[False, False]] + [[True, True]] * 3


@pytest.mark.parametrize("differ", ["shape", "function", "table", "dtype"])
def test_losses_that_differ_may_follow_each_other(differ):
    """Forward and backward of the one, then of the other: each has its own factor."""
    tables = torch.ones(2, 5), torch.ones(2, 5)
    index = torch.zeros(2, 1, dtype=torch.int64)

    def step(poison):
        results = []
        for k, factor in enumerate((1.0, 0.5)):
            x = prediction((2, 64 if k == 0 or differ != "shape" else 32))
            if k and differ == "dtype":
                x = x.detach().bfloat16().requires_grad_()
            weight = Gathered(tables[k][0], index) if differ == "table" else ONE
            one = loss(x, weight, "l1" if k and differ == "function" else "mse")
            want = expected(x, factor)
            if k and differ == "function":
                want = factor * (x - N).detach().sign() / x.numel()
            if poison:
                poisoned(one)
            results.append((grad(factor * one, x)[0], want.to(x.dtype)))
        return results

    assert rounds(step)[1:] == [[True, True]] * 3


def test_a_loss_of_a_new_shape_begins_with_what_came_last():
    """Batches of many sizes, scaled alike: nothing is computed again after the first."""
    found = []
    for width in (64, 48, 32, 16, 24, 40):
        x = prediction((2, width))
        one = loss(x)
        poisoned(one)
        found.append(kept(grad(one / 8, x)[0]))
    assert found == [False] + [True] * 5


def test_gradient_accumulation():
    x, found = prediction(), []
    for _ in range(6):
        one = loss(x)
        poisoned(one)
        found.append(kept(grad(one / 4, x)[0]))
    assert found == [False] + [True] * 5
    for _ in range(4):
        (loss(x) / 4).backward()
    torch.testing.assert_close(x.grad, expected(x, 1.0))


def test_retain_graph_twice():
    for _ in range(2):
        x = prediction()
        scaled = 0.5 * loss(x)
        for _ in range(3):
            torch.testing.assert_close(grad(scaled, x, retain_graph=True)[0], expected(x, 0.5))
        scaled.backward()
        torch.testing.assert_close(x.grad, expected(x, 0.5))
    x = prediction()
    one = loss(x)
    poisoned(one)
    first, second = (grad(0.5 * one, x, retain_graph=True)[0] for _ in range(2))
    assert kept(first), "the factor of the round before"
    assert not kept(second), "what was written is given away once"


def test_a_loss_whose_backward_never_comes():
    """Nor the one that is kept, nor those that are thrown away, take the factor from those that follow."""
    x = prediction()
    held = loss(x)
    for _ in range(5):
        loss(x)  # an evaluation
    found = []
    for _ in range(3):
        one = loss(x)
        poisoned(one)
        found.append(kept(grad(0.5 * one, x)[0]))
    assert found == [False, True, True]
    torch.testing.assert_close(grad(held, x)[0], expected(x, 1.0))
    (waiting,) = [cells.waiting for cells in workspace._cells.values()]
    assert not waiting, "nothing is kept of losses that are gone"


def test_the_number_of_cells_is_bounded(stream):
    held = [workspace.cell(CPU, ("kind", k)) for k in range(3 * workspace._CELLS)]
    (cells,) = workspace._cells.values()
    assert len(cells.values) == workspace._CELLS == len({one.value.data_ptr() for one in held})
    latest = held[-1].value
    latest.fill_(0.25)
    del held
    assert workspace.cell(CPU, ("kind", 3 * workspace._CELLS - 1)).value is latest
    assert float(workspace.cell(CPU, ("kind", 0)).value) == 0.25, "one that was forgotten begins with what came last"


def test_cells_are_chosen_one_at_a_time(stream):
    """The forwards of many threads at once: the same loss to the host, all waiting, and a cell for each."""
    found = []

    def choose():
        for _ in range(8):
            found.append(workspace.cell(CPU, "kind"))

    threads = [threading.Thread(target=choose) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({one.value.data_ptr() for one in found}) == 32


def test_streams_share_no_cell(stream):
    of_stream = {}
    for stream["stream"] in (1, 2):
        held = [workspace.cell(CPU, k % 3) for k in range(9)]
        of_stream[stream["stream"]] = {one.value.data_ptr() for one in held}
    assert of_stream[1].isdisjoint(of_stream[2])


def test_numbers_that_are_given_are_kept_for_their_stream(monkeypatch, stream):
    """Not those of a capture, whose graph reads them later; and only so many."""
    monkeypatch.setattr(workspace, "_numbers", {})
    first = workspace.single(0.25, CPU)
    assert workspace.single(0.25, CPU) is first and float(first) == 0.25 and first.dtype == torch.float32
    assert float(workspace.single(0.5, CPU)) == 0.5
    stream["capturing"] = True
    assert workspace.single(0.25, CPU) is not first
    stream["capturing"], stream["stream"] = False, 2
    assert workspace.single(0.25, CPU) is not first
    for k in range(2 * workspace._MOST_NUMBERS):
        assert float(workspace.single(float(k), CPU)) == k
    assert len(workspace._numbers) <= workspace._MOST_NUMBERS


def test_a_backward_on_another_stream_leaves_the_forwards_cell(stream):
    """Nor does one that is captured write where eager launches read, or the other way round."""
    for before, after in (((1, False), (2, False)), ((1, False), (1, True)), ((1, True), (1, False))):
        workspace._cells.clear()
        workspace.cell(CPU, "there is something to capture with")
        x = prediction()
        stream["stream"], stream["capturing"] = before
        one = loss(x)
        cell = one.grad_fn.written[2].value
        stream["stream"], stream["capturing"] = after
        torch.testing.assert_close(grad(0.5 * one, x)[0], expected(x, 0.5))
        assert float(cell) == 0


class Graph:
    """What a CUDA graph does, with launches that are made again: all its memory stays where it is, and what is zeroed
    in it is zeroed at each replay."""

    def __init__(self, monkeypatch, stream, body):
        self.launches, self.zeroed = [], []
        with monkeypatch.context() as patch:
            call, zeros = launch.Kernel.__call__, torch.zeros

            def launched(kernel, *rest):
                self.launches.append((call, kernel, *rest))
                call(kernel, *rest)

            def zero(*arguments, **how):
                self.zeroed.append(zeros(*arguments, **how))
                return self.zeroed[-1]

            patch.setattr(launch.Kernel, "__call__", launched)
            patch.setattr(torch, "zeros", zero)
            stream["capturing"] = True
            self.results = body()
            stream["capturing"] = False

    def replay(self, between=lambda: None):
        """``between``: is called after the forwards."""
        for tensor in self.zeroed:
            tensor.zero_()
        forwards = sum(arguments[RESULT] is not None for _, _, _, _, arguments, _ in self.launches)
        for k, (call, *launched) in enumerate(self.launches):
            if k == forwards:
                between()
            call(*launched)


def captured_step(monkeypatch, stream, factors=(1.0, 0.5)):
    inputs = [prediction() for _ in factors]
    written = []

    def body():
        losses = [loss(x) for x in inputs]
        written[:] = [one.grad_fn.written[0] for one in losses]
        total = sum(factor * one for factor, one in zip(factors, losses))
        return torch.autograd.grad(total, inputs)

    return Graph(monkeypatch, stream, body), inputs, written


def found_there(graph, written):
    def poison():
        for gradient in written:
            gradient.fill_(77.0)

    graph.replay(poison)
    return [kept(gradient) for gradient in graph.results]


def test_replays_of_a_scaled_loss_find_their_gradients(monkeypatch, stream):
    workspace.cell(CPU, "something ran before the capture")
    graph, inputs, written = captured_step(monkeypatch, stream)
    found = [found_there(graph, written) for _ in range(4)]
    assert found[1:] == [[True, True]] * 3
    graph.replay()
    for got, x, factor in zip(graph.results, inputs, (1.0, 0.5)):
        torch.testing.assert_close(got, expected(x, factor))
    assert all(tensor.dtype == torch.int32 for tensor in graph.zeroed), "only counters"


def test_without_a_run_before_replays_are_right(monkeypatch, stream):
    graph, inputs, written = captured_step(monkeypatch, stream)
    for _ in range(3):
        graph.replay()
        for got, x, factor in zip(graph.results, inputs, (1.0, 0.5)):
            torch.testing.assert_close(got, expected(x, factor))


def test_graphs_share_no_cell(monkeypatch, stream):
    """With each other, or with what runs eagerly: each keeps its own factors, however they are mixed."""
    workspace.cell(CPU, "something ran before the capture")
    graphs = [captured_step(monkeypatch, stream, factors)[::2] for factors in ((1.0, 0.5), (0.25, 2.0), (0.5, 1.0))]
    x = prediction()
    for turn in range(3):
        for graph, written in graphs:
            found = found_there(graph, written)
            assert found == [True, True] or turn == 0
        one = loss(x)
        poisoned(one)
        assert kept(grad(8.0 * one, x)[0]) or turn == 0


def test_captures_beyond_the_reserved_cells_are_zeroed_at_replay(monkeypatch, stream):
    workspace.cell(CPU, "something ran before the capture")
    stream["capturing"] = True
    cells = {workspace.cell(CPU, "kind").value.data_ptr() for _ in range(workspace._RESERVED)}
    assert len(cells) == workspace._RESERVED
    last = workspace.cell(CPU, "kind").value
    assert last.shape == (1,) and float(last) == 0 and last.data_ptr() not in cells
    held = {cell.data_ptr() for cell in workspace._reserved[CPU].cells}
    assert held == cells, "graphs go on using them"
