"""Memory that is used again: never while anybody can see it, and then with the same numbers and no new pages."""

import copy
import gc
import io
import os
import pickle
import random
import threading
import time
import weakref

import numpy as np
import pytest
import torch
from accuracy import assert_same
from asked import native
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

import fastdiff
from fastdiff import ops, recycling

resource = pytest.importorskip("resource")
if not native.available:
    pytest.skip(native.unavailable_because, allow_module_level=True)
pytestmark = pytest.mark.skipif(bool(recycling.reason()), reason=recycling.reason())

SHAPE = (4, 4, 128, 128)  # 1 MiB in float32
OBJECTIVE = fastdiff.Objective(fastdiff.VariancePreserving(), "v_prediction", fastdiff.MinSNR(5.0))


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """On the backend that keeps memory, with nothing kept before or after, and no looks for what is unused. The other
    tests have PyTorch fill new memory (tests/conftest.py), for which nothing is kept."""
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(recycling, "_next_look", float("inf"))
    recycling.release_memory()
    with fastdiff.use_backend("native"):
        yield
    recycling.release_memory()


@pytest.fixture
def x0():
    return torch.randn(SHAPE)


def made(fill):
    tensor = recycling.empty(SHAPE, torch.float32)
    return tensor.fill_(fill)


def write_over(times=8):
    """Make results and write into them, as many as could come from memory that is kept."""
    held = [made(float("nan")) for _ in range(times)]
    del held


def addresses(times=4):
    """Where the next results lie, all held at once."""
    return {tensor.data_ptr() for tensor in [recycling.empty(SHAPE, torch.float32) for _ in range(times)]}


def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def trained(x0, prediction, objective=OBJECTIVE):
    noised = objective.noise(x0)
    loss = objective.loss(prediction, noised)
    loss.backward()
    prediction.grad = None


# -------------------------------------------------------------------------------------------- what it is for


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8, 4, 128, 128), (64, 4, 64, 64), (2, 3, 1024, 2048)], ids=str)
def test_a_training_step_has_no_new_pages(shape, dtype):
    x0 = torch.randn(shape).to(dtype)
    prediction = torch.randn(shape).to(dtype).requires_grad_()
    for _ in range(3):
        trained(x0, prediction)
    before = faults()
    for _ in range(10):
        trained(x0, prediction)
    assert faults() - before <= 200


def sampler_steps(x0):
    t = torch.full((len(x0),), 500)
    step = torch.randn(len(ops.COLUMNS))
    ops.step(x0, x0, step)
    OBJECTIVE.predict_x0(x0, OBJECTIVE.noise(x0, t, x0))


def of_rows(x0):
    """The general way, whose x_t lies as channels_last, and whose rows are frames."""
    lying = x0.contiguous(memory_format=torch.channels_last).requires_grad_()
    flow = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow")
    noised = flow.noise(x0, torch.rand(x0.shape[:2]))
    flow.loss(lying, noised).backward()
    OBJECTIVE.noise(lying.detach(), seed=1)


@pytest.mark.parametrize("steps", [sampler_steps, of_rows], ids=lambda steps: steps.__name__)
def test_other_results_come_from_the_same_memory(steps, x0):
    """The only new memory is what PyTorch itself makes."""
    steps(x0)
    kept = {id(each) for each in recycling._kept}
    assert kept
    for _ in range(3):
        steps(x0)
    assert {id(each) for each in recycling._kept} == kept


def test_ten_thousand_steps_in_short(x0):
    prediction = torch.randn(SHAPE, requires_grad=True)
    for _ in range(20):
        trained(x0, prediction)
    before, kept = resident(), len(recycling._kept)
    for _ in range(200):
        trained(x0, prediction)
    assert len(recycling._kept) == kept <= 6
    assert resident() - before < 4 << 20


def test_the_numbers_are_those_of_new_memory(x0, monkeypatch):
    prediction = torch.randn(SHAPE, requires_grad=True)

    def run():
        noised = OBJECTIVE.noise(x0, seed=5)
        (gradient,) = torch.autograd.grad(OBJECTIVE.loss(prediction, noised), prediction)
        return noised.x_t.clone(), noised.noise.clone(), gradient.clone()

    write_over()
    recycled = run()
    monkeypatch.setattr(recycling, "_reason", "so")
    for ours, plain in zip(recycled, run()):
        assert_same(ours, plain)


def test_small_results_are_left_to_pytorch():
    OBJECTIVE.noise(torch.randn(4, 4, 128, 127))  # 4 KiB less than is kept
    assert not recycling._kept
    OBJECTIVE.noise(torch.randn(4, 4, 128, 128))
    assert len(recycling._kept) == 2


# -------------------------------------------------------------------------------------------- who holds it

HOLDERS = {
    "the tensor": lambda x: x,
    "a view": lambda x: x[1:, 2],
    "a view of another dtype": lambda x: x.view(torch.int16),
    "detach": lambda x: x.detach(),
    "data": lambda x: x.data,
    "an alias": lambda x: torch.empty(0).set_(x),
    "its storage": lambda x: x.untyped_storage(),
    "its typed storage": lambda x: x.storage(),  # deprecated, and still there
    "an array": lambda x: x.numpy(),
    "a slice of an array": lambda x: x.numpy()[2:, 1],
    "a memoryview": lambda x: memoryview(x.numpy()),
    "an array through DLPack": lambda x: np.from_dlpack(x),
    "a tensor through DLPack": lambda x: torch.from_dlpack(x),
    "a tensor of an array": lambda x: torch.from_numpy(x.numpy()),
    "a tensor of a buffer": lambda x: torch.frombuffer(x.numpy(), dtype=torch.float32),
    "a parameter": lambda x: torch.nn.Parameter(x),
    "a module": lambda x: torch.nn.Module().register_buffer("x", x) or x,
    "split": lambda x: x.split(1)[1:],
    "a lazy clone": lambda x: x._lazy_clone(),
    "shared memory": lambda x: x.share_memory_(),
    "a closure": lambda x: lambda: x,
}


def seen(holder):
    """The numbers that a holder sees."""
    if callable(holder):
        holder = holder()
    if isinstance(holder, tuple):
        holder = torch.cat(holder)
    if isinstance(holder, torch.UntypedStorage):
        holder = torch.empty(0).set_(holder, 0, (holder.nbytes() // 4,))
    if isinstance(holder, torch.storage.TypedStorage):
        holder = torch.empty(0).set_(holder)
    return torch.as_tensor(np.array(holder) if not isinstance(holder, torch.Tensor) else holder.detach()).clone()


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("how", HOLDERS)
def test_what_is_held_is_not_written_over(how):
    first = made(0.0)
    first.view(-1).copy_(torch.arange(first.numel()))
    address, expected = first.data_ptr(), seen(HOLDERS[how](first.clone()))
    holder = HOLDERS[how](first)
    del first
    write_over()
    assert_same(seen(holder), expected)
    assert address not in addresses()
    del holder
    gc.collect()
    write_over()


def test_what_autograd_saved_is_not_written_over():
    x = made(2.0)
    weight = torch.ones(SHAPE, requires_grad=True)
    y = (weight * x).square().sum()
    del x
    write_over()
    y.backward()
    assert_same(weight.grad, torch.full(SHAPE, 8.0))


def test_gradients_that_are_kept_are_not_written_over(x0):
    """``_Loss`` gives the gradient away, and it becomes ``.grad``: of a leaf, and through a graph."""
    leaf = torch.randn(SHAPE, requires_grad=True)
    noised = OBJECTIVE.noise(x0)
    OBJECTIVE.loss(leaf * 1.0, noised).backward()
    once = leaf.grad.clone()
    write_over()
    assert_same(leaf.grad, once)
    leaf.grad = None
    OBJECTIVE.loss(leaf, noised).backward()
    assert_same(leaf.grad, once)
    write_over()
    assert_same(leaf.grad, once)
    OBJECTIVE.loss(leaf, noised).backward()
    assert_same(leaf.grad, 2 * once)


def test_losses_of_one_batch_have_gradients_of_their_own(x0):
    leaves = [torch.randn(SHAPE, requires_grad=True) for _ in range(4)]
    noised = OBJECTIVE.noise(x0)
    losses = [OBJECTIVE.loss(leaf, noised) for leaf in leaves]
    torch.stack(losses).sum().backward()
    for leaf in leaves:
        (alone,) = torch.autograd.grad(OBJECTIVE.loss(leaf, noised), leaf)
        assert_same(leaf.grad, alone)


@pytest.mark.parametrize("weakly", [weakref.ref, StorageWeakRef], ids=lambda kind: kind.__name__)
def test_memory_that_is_referred_to_weakly_is_not_used_again(weakly):
    """Whoever has a weak reference could make it a strong one, and see what another tensor holds. It expires as soon
    as memory is given back."""
    x = made(1.0)
    address, weak = x.data_ptr(), weakly(x.untyped_storage())
    del x
    assert address not in addresses()
    assert len(recycling._kept) == 5
    recycling.release_memory()
    assert weak.expired() if weakly is StorageWeakRef else weak() is None


def test_an_attribute_of_a_storage_is_not_handed_on():
    x = made(1.0)
    x.untyped_storage().mine = 1
    address = x.data_ptr()
    del x
    assert address not in addresses()


def test_weak_references_to_tensors_expire():
    x = made(1.0)
    weak = weakref.ref(x)
    del x
    assert weak() is None


def test_resizing_ends_the_use_of_a_storage():
    grown, shrunk, emptied = (made(float(k)) for k in range(3))
    grown.resize_(2 * grown.numel())
    assert grown.numel() == 2 * shrunk.numel() and grown.view(-1)[0] == 0
    shrunk.resize_(5)
    emptied.untyped_storage().resize_(0)
    assert emptied.untyped_storage().nbytes() == 0
    address = shrunk.data_ptr()
    del grown, shrunk, emptied
    assert address in addresses()  # resizing a tensor to less leaves the storage as it is
    recycling._next_look = 0.0
    recycling._look_if_due()
    assert len(recycling._kept) == 4  # of addresses(): one of the three, and three that were made for it


def test_a_lazy_clone_keeps_its_numbers():
    x = made(3.0)
    clone = x._lazy_clone()
    del x
    write_over()
    assert torch._C._is_cow_tensor(clone)
    assert (clone == 3).all()


def test_memory_of_another_process_is_not_used_again():
    x = made(1.0).share_memory_()
    assert x.is_shared()
    address = x.data_ptr()
    del x
    later = [recycling.empty(SHAPE, torch.float32) for _ in range(4)]
    assert not any(tensor.is_shared() or tensor.data_ptr() == address for tensor in later)


def test_any_order_of_holding_and_dropping():
    """Tensors, views and arrays made and dropped at random: each keeps what was written into it last."""
    chosen, held = random.Random(0), {}
    names = [name for name in HOLDERS if "typed" not in name and "closure" not in name]
    for k in range(400):
        while len(held) > chosen.randrange(12):
            del held[chosen.choice(list(held))]
        first = made(float(k))
        held[k] = HOLDERS[chosen.choice(names)](first)
        del first
        if k % 10 == 0:
            for fill, holder in held.items():
                numbers = seen(holder)
                assert (numbers.view(torch.float32) == fill).all()


# -------------------------------------------------------------------------------------------- ordinary tensors


def results(x0):
    noised = OBJECTIVE.noise(x0, seed=1)
    prediction = torch.zeros(SHAPE, requires_grad=True)
    (gradient,) = torch.autograd.grad(OBJECTIVE.loss(prediction, noised), prediction)
    return noised.x_t, noised.noise, gradient


def test_results_are_ordinary_tensors(x0):
    write_over()
    for x in results(x0):
        want = x.clone()
        assert type(x) is torch.Tensor and x.is_leaf and not x.requires_grad and not x._is_view() and x._base is None
        assert x.is_contiguous() and x.storage_offset() == 0 and x.untyped_storage().nbytes() == x.nbytes
        assert x.untyped_storage().resizable() and x.data_ptr() % 64 == 0
        file = io.BytesIO()
        torch.save(x, file)
        assert x.nbytes <= file.tell() < x.nbytes + 4096
        file.seek(0)
        assert_same(torch.load(file), want)
        for other in (copy.deepcopy(x), pickle.loads(pickle.dumps(x)), copy.copy(x)):
            assert_same(other, want)
        version = x._version
        x.add_(1)
        assert x._version == version + 1
        assert_same(x, want + 1)
        x.requires_grad_().square().sum().backward()
        assert_same(x.grad, 2 * (want + 1))
        x.detach().resize_(3, 5)
        x.data = torch.zeros(2)
        assert x.shape == (2,)


def test_results_of_inference_mode(x0):
    """Memory goes from inference tensors to others and back."""
    want = OBJECTIVE.noise(x0, seed=1).x_t.clone()
    with torch.inference_mode():
        within = OBJECTIVE.noise(x0, seed=1).x_t
        assert within.is_inference()
        assert_same(within, want)
    del within
    outside = OBJECTIVE.noise(x0, seed=1).x_t
    assert not outside.is_inference() and outside._version >= 0
    assert_same(outside.requires_grad_().clone(), want)
    del outside
    with torch.inference_mode():
        assert_same(OBJECTIVE.noise(x0, seed=1).x_t.add_(1), want + 1)


def test_new_memory_is_filled_where_pytorch_fills_it():
    write_over()
    torch.use_deterministic_algorithms(True)
    try:
        assert recycling.empty(SHAPE, torch.float32).isnan().all()
        assert recycling.empty_like(torch.zeros(SHAPE)).isnan().all()
    finally:
        torch.use_deterministic_algorithms(False)


def test_modes_see_what_they_saw(x0):
    recycling.empty(SHAPE, torch.float32)
    known = len(recycling._kept)
    with FlopCounterMode(display=False):
        recycling.empty((8, *SHAPE), torch.float32)
    fake = torch._subclasses.FakeTensorMode()
    with fake:
        assert isinstance(recycling.empty((8, *SHAPE), torch.float32), torch._subclasses.FakeTensor)
    with torch.device("meta"):
        assert recycling.empty(SHAPE, torch.float32).device.type == "cpu"
    assert len(recycling._kept) == known


def test_compiled_graphs_keep_their_results(x0):
    step = torch.compile(lambda x0: OBJECTIVE.noise(x0, torch.full((4,), 500), seed=3).x_t * 1.0, backend="aot_eager")
    first = step(x0)
    want = first.clone()
    second = step(x0 + 1)
    assert_same(first, want)
    assert not torch.equal(first, second)


def test_strides_are_those_of_pytorch():
    x = torch.empty(4, 6, 128, 128).permute(0, 3, 1, 2)
    for like in (x, x.contiguous(), x.contiguous(memory_format=torch.channels_last), x[:, ::2], x.double()[:1]):
        for dtype in (None, torch.float64):
            got, want = recycling.empty_like(like, dtype=dtype), torch.empty_like(like, dtype=dtype)
            assert (got.stride(), got.shape, got.dtype) == (want.stride(), want.shape, want.dtype)
            assert got.untyped_storage().nbytes() == want.untyped_storage().nbytes()
    parameter = recycling.empty_like(torch.nn.Parameter(x))
    assert type(parameter) is torch.Tensor and not parameter.requires_grad


# -------------------------------------------------------------------------------------------- how much is kept


def test_release_memory():
    held, free = made(1.0), made(2.0)
    del free
    assert recycling.release_memory() == held.nbytes
    assert recycling.release_memory() == 0
    write_over()
    assert (held == 1).all()
    address = held.data_ptr()
    del held
    assert address not in {kept.storage.data_ptr() for kept in recycling._kept}


def test_released_memory_goes_back_to_the_system():
    tensors = [recycling.empty((8 << 20,), torch.uint8).fill_(1) for _ in range(8)]
    held = resident()
    del tensors
    assert held - resident() < 8 << 20  # it is kept
    assert recycling.release_memory() == 64 << 20
    assert held - resident() > 48 << 20


def test_no_more_is_kept_than_allowed(monkeypatch):
    monkeypatch.setattr(recycling, "MOST", 5 << 20)
    tensors = [made(float(k)) for k in range(9)]
    assert sum(kept.nbytes for kept in recycling._kept) == 5 << 20
    recycling.empty((6 << 20,), torch.uint8)  # more than all of it
    assert sum(kept.nbytes for kept in recycling._kept) == 5 << 20
    write_over()
    assert all((tensor == k).all() for k, tensor in enumerate(tensors))
    monkeypatch.setattr(recycling, "MOST_STORAGES", 3)
    recycling.empty((3 << 20,), torch.uint8)
    assert len(recycling._kept) <= 3


def test_kept_memory_is_given_back_where_there_is_no_other(monkeypatch):
    """Memory of the system ends: then what is kept and free makes room."""
    free = made(1.0)
    del free
    plain = torch.UntypedStorage

    def scarce(nbytes, device):
        if recycling._kept:
            raise RuntimeError("can't allocate memory")
        return plain(nbytes, device=device)

    monkeypatch.setattr(torch, "UntypedStorage", scarce)
    assert recycling.empty((3 << 20,), torch.uint8).nbytes == 3 << 20
    assert len(recycling._kept) == 1


def test_unused_memory_goes_back_after_a_while(monkeypatch):
    monkeypatch.setattr(recycling, "_next_look", 0.0)
    now = [time.monotonic() + 1000]
    monkeypatch.setattr(recycling.time, "monotonic", lambda: now[0])
    busy, free = made(1.0), made(2.0)
    del free
    now[0] += recycling.SECONDS / 5
    gc.collect()  # which looks, and sees for the first time that it is free
    assert len(recycling._kept) == 2
    now[0] += recycling.SECONDS / 2
    gc.collect()
    assert len(recycling._kept) == 2
    now[0] += recycling.SECONDS
    gc.collect()
    assert [kept.storage.data_ptr() for kept in recycling._kept] == [busy.data_ptr()]
    now[0] += 100 * recycling.SECONDS
    gc.collect()
    assert len(recycling._kept) == 1
    del busy
    now[0] += 100 * recycling.SECONDS  # a step may take long: what has just become free is used, not given back
    recycling.empty((2 << 20,), torch.uint8)
    assert len(recycling._kept) == 2


def test_where_nothing_can_be_seen_nothing_is_kept(x0, monkeypatch):
    monkeypatch.delattr(torch._C, "_storage_Use_Count")
    assert not recycling._sees_changes()
    monkeypatch.undo()
    monkeypatch.setattr(recycling._Kept, "free", lambda self: True)
    assert not recycling._sees_changes()
    monkeypatch.setattr(recycling, "_reason", "so")
    OBJECTIVE.noise(x0)
    assert not recycling._kept


# -------------------------------------------------------------------------------------------- threads and processes


def test_threads_at_once(x0):
    """Each thread makes, holds and drops results, which no other writes into; one gives memory back meanwhile."""
    failed, done = [], threading.Event()

    def work(seed):
        leaf = torch.randn(SHAPE, requires_grad=True)
        want = OBJECTIVE.noise(x0, seed=seed).x_t.clone()
        for _ in range(25):
            noised = OBJECTIVE.noise(x0, seed=seed)
            OBJECTIVE.loss(leaf, noised).backward()
            gradient = leaf.grad
            leaf.grad = None
            again = OBJECTIVE.noise(x0, seed=seed)
            if not torch.equal(noised.x_t, want) or not torch.equal(again.x_t, want) or gradient.isnan().any():
                failed.append(seed)

    def release():
        while not done.wait(0.005):
            recycling.release_memory()

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    other = threading.Thread(target=release)
    for thread in (*workers, other):
        thread.start()
    for worker in workers:
        worker.join()
    done.set()
    other.join()
    assert not failed


def test_two_threads_never_take_the_same(monkeypatch):
    """Between the look at a storage and taking it out of the list, another thread takes it."""
    x = made(1.0)
    del x
    free, taken = recycling._Kept.free, []

    def interrupted(kept):
        found = free(kept)
        if found and not taken:
            taken.append(None)  # once
            taken.append(recycling.empty(SHAPE, torch.float32))
        return found

    monkeypatch.setattr(recycling._Kept, "free", interrupted)
    mine = recycling.empty(SHAPE, torch.float32)
    assert taken[1].data_ptr() != mine.data_ptr()


def child_of_fork(check):
    """Whether ``check`` holds in a forked process."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if check() else 1)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_forks_while_threads_take_memory():
    """A child has its own memory, also where a thread of its parent was about to take some."""
    held, stop = made(7.0), threading.Event()

    def take():
        while not stop.is_set():
            made(1.0)

    def check():
        write_over(4)
        return bool((held == 7).all()) and recycling.release_memory() >= 0

    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        assert all(child_of_fork(check) for _ in range(10))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert (held == 7).all()


class Noised(torch.utils.data.Dataset):
    """x_t, made in the process of a worker, and sent through shared memory."""

    def __len__(self):
        return 6

    def __getitem__(self, k):
        with fastdiff.use_backend("native"):
            return OBJECTIVE.noise(torch.zeros(SHAPE), seed=k).x_t


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_workers_of_a_data_loader():
    write_over()
    loader = torch.utils.data.DataLoader(
        Noised(), batch_size=None, num_workers=2, multiprocessing_context="fork", prefetch_factor=3
    )
    for k, x_t in enumerate(list(loader)):
        assert_same(x_t, OBJECTIVE.noise(torch.zeros(SHAPE), seed=k).x_t)
