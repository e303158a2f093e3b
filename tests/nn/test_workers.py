"""Structured modules in other processes: sent to one, and trained by several at once."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.multiprocessing as mp
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tvm_structured.nn import StructuredConv2d, StructuredLinear


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        StructuredConv2d(4, 8, 3, "block_circulant", block=4),
        nn.Flatten(),
        StructuredLinear(128, 32, "permuted_diagonal", block=4),
        nn.ReLU(),
        StructuredLinear(32, 8, "low_rank", rank=3),
    )


def answer(queue, model, x):
    queue.put(model(x).detach().numpy())


def train_part(rank, port, queue):
    """One of two workers: its half of the batch, and the gradients that both agree upon."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = DistributedDataParallel(network())
    model(images()[4 * rank : 4 * rank + 4]).square().mean().backward()
    queue.put((rank, [p.grad.numpy() for p in model.parameters()]))
    dist.barrier()
    dist.destroy_process_group()


def images():
    return torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(1))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_a_module_works_in_a_fresh_process():
    context = mp.get_context("spawn")
    queue, model = context.Queue(), network()
    process = context.Process(target=answer, args=(queue, model, images()))
    process.start()
    found = queue.get(timeout=120)
    process.join()
    torch.testing.assert_close(torch.from_numpy(found), model(images()).detach())


@pytest.mark.slow
def test_two_workers_agree_on_the_gradients_of_one():
    context = mp.get_context("spawn")
    queue, port = context.Queue(), free_port()
    workers = [context.Process(target=train_part, args=(rank, port, queue)) for rank in range(2)]
    for worker in workers:
        worker.start()
    found = dict(queue.get(timeout=240) for _ in workers)
    for worker in workers:
        worker.join()
    model = network()
    model(images()).square().mean().backward()
    for rank in range(2):
        for gradient, parameter in zip(found[rank], model.parameters(), strict=True):
            torch.testing.assert_close(torch.from_numpy(gradient), parameter.grad, rtol=1e-4, atol=1e-6)


def test_replicas_on_threads_train_alike():
    """Indices are remembered by tensor; threads that meet at once get the same ones."""
    from concurrent.futures import ThreadPoolExecutor

    def gradients():
        model = network()
        model(images()).square().mean().backward()
        return [p.grad for p in model.parameters()]

    torch.manual_seed(0)
    shared = StructuredLinear(400, 400, "permuted_diagonal", block=8)
    x = torch.randn(5, 400)
    expected = shared(x).detach()
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(lambda _: shared(x).detach(), range(12)))
    assert all(torch.equal(output, expected) for output in outputs)
    first, second = gradients(), gradients()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
