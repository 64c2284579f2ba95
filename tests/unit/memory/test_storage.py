"""The facts about torch storages that the memory package relies on."""

from __future__ import annotations

import ctypes

import torch

from kunserve_sgl.memory.storage import StorageWatch, holders, storage_id, tensor_at


def test_a_tensor_at_an_address_is_that_memory() -> None:
    memory = (ctypes.c_uint8 * 64)()
    tensor = tensor_at(ctypes.addressof(memory), 64, torch.device("cpu"))
    tensor[5] = 17
    memory[6] = 18
    assert (memory[5], int(tensor[6])) == (17, 18)
    assert tensor.untyped_storage().nbytes() == 64
    assert tensor.data_ptr() == ctypes.addressof(memory)


def test_two_tensors_at_one_address_have_two_storages() -> None:
    memory = (ctypes.c_uint8 * 64)()
    a, b = (tensor_at(ctypes.addressof(memory), 64, torch.device("cpu")) for _ in range(2))
    assert storage_id(a) != storage_id(b)
    assert storage_id(a) == storage_id(a[3:5].view(torch.int8))


def test_a_watch_ends_with_the_last_view() -> None:
    tensor = torch.zeros(8)
    watch = StorageWatch(tensor)
    view = tensor[2:]
    del tensor
    assert not watch.is_dead
    parameter = torch.nn.Parameter(view, requires_grad=False)
    del view
    assert not watch.is_dead
    parameter.data = torch.empty(0)
    assert watch.is_dead


def test_holders_counts_every_tensor_of_a_storage() -> None:
    tensor = torch.zeros(8)
    storage = tensor.untyped_storage()
    assert holders(storage) == 1
    view = tensor[1:]
    parameter = torch.nn.Parameter(tensor.view(2, 4), requires_grad=False)
    assert holders(storage) >= 3
    assert parameter.numel() + view.numel() == 15
    parameter.data = torch.empty(0)
    del view, tensor, parameter
    assert holders(storage) == 0


def test_data_can_be_replaced_in_an_inference_tensor() -> None:
    with torch.inference_mode():
        parameter = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    watch = StorageWatch(parameter)
    parameter.data = torch.full((5,), 2.0)
    assert watch.is_dead
    assert parameter.tolist() == [2.0] * 5
