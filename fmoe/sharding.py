"""Which experts are mine, and tensors of experts in and out of DTensor (NeMo Automodel's `state_dict_utils`).

`expert_range` says which experts a rank has; where DTensor's own Shard(0), ceil-chunks, differs, every rank raises.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from operator import index
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

from fmoe.entrance import held
from fmoe.folding import brief

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def expert_range(n_experts: int, n_ranks: int, rank: int) -> range:
    """Consecutive over the ranks, their union is [0, E), lengths differ by at most one, longer ones first.

    ValueError unless n_experts >= 0 and 0 <= rank < n_ranks. Source: NeMo Automodel state_dict_utils (private there).

    >>> [expert_range(8, 3, rank) for rank in range(3)]
    [range(0, 3), range(3, 6), range(6, 8)]
    """
    n_experts, n_ranks, rank = given = [*map(index, (n_experts, n_ranks, rank))]  # of tensors and of NumPy too
    if not 0 <= n_experts < 2**63 or not 0 <= rank < n_ranks < 2**63:
        told = "n_experts={}, n_ranks={}, rank={}: expected n_experts >= 0 and 0 <= rank < n_ranks"
        raise ValueError(told.format(*map(brief, given)))
    count, extra = divmod(n_experts, n_ranks)
    return range(*(r * count + min(r, extra) for r in (rank, rank + 1)))


def is_dtensor(tensor: object) -> TypeGuard[DTensor]:
    """isinstance(tensor, DTensor), without an import of what makes one. Source: NeMo Automodel state_dict_utils.

    >>> is_dtensor(torch.ones(2))
    False
    """
    return isinstance(tensor, getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ()))


def get_submesh(device_mesh: DeviceMesh, dims: tuple[str, ...]) -> DeviceMesh:
    """device_mesh[dims], and what it raises: KeyError for other names.

    >>> get_submesh(type("Mesh", (dict,), {})({("ep",): "ranks that share experts"}), ("ep",))  # indexed as a mesh is
    'ranks that share experts'
    """
    return device_mesh[tuple(dims)]


def get_expert_range_for_rank_from_mesh(device_mesh: DeviceMesh | None, n_experts: int) -> tuple[int, int]:
    """(start, end) of `expert_range(E, n, i)`: this process is the i-th of the n along `ep`; (0, E) without a mesh.

    A mesh without an `ep` dim counts as a whole; n > E leaves some ranges empty. ValueError for a process outside the
    mesh, and for a mesh of several dims without `ep`. Source: NeMo Automodel state_dict_utils.

    >>> get_expert_range_for_rank_from_mesh(None, 8)
    (0, 8)
    """
    if device_mesh is None:
        return 0, len(expert_range(n_experts, 1, 0))
    mesh = get_submesh(device_mesh, ("ep",)) if "ep" in (device_mesh.mesh_dim_names or ()) else device_mesh
    return (mine := expert_range(n_experts, mesh.size(), _place(mesh))).start, mine.stop


def should_load_expert_for_rank(expert_id: int, device_mesh: DeviceMesh | None, n_experts: int) -> bool:
    """start <= expert_id < end of `get_expert_range_for_rank_from_mesh`. Source: NeMo Automodel state_dict_utils.

    >>> [should_load_expert_for_rank(e, None, 2) for e in (0, 1, 2)]
    [True, True, False]
    """
    return expert_id in range(*get_expert_range_for_rank_from_mesh(device_mesh, n_experts))


def get_expert_slice_for_rank(experts_tensor: Tensor, n_experts: int) -> tuple[Tensor, int, int]:
    """(local, start, end): local is this rank's storage (an alias), and its rows are experts start to end - 1.

    experts_tensor [E, ...]: a plain one comes back as it is, with (0, E), whatever its shape. Of a DTensor: the local
    shard, and the `expert_range` along the mesh dim that is Shard(0), whatever its name; (0, E) without one.
    ValueError for another dim 0 than E, cut by two mesh dims or unlike `expert_range`, or neither Shard nor Replicate.

    >>> get_expert_slice_for_rank(torch.ones(4), 4)
    (tensor([1., 1., 1., 1.]), 0, 4)
    """
    if not is_dtensor(experts_tensor):
        return experts_tensor, 0, len(expert_range(n_experts, 1, 0))
    mine = _experts_of(experts_tensor, n_experts, "DTensor of experts")
    return experts_tensor.to_local(), mine.start, mine.stop


def split_experts_weights_dtensor_aware(weight: Tensor, n_experts: int) -> tuple[list[Tensor], list[int]]:
    """([weight[e] for e in ids], ids): ids are the experts on this rank, and each element is a view of its storage.

    weight [E, ...] gives elements [...]. Where mesh dims other than the experts' own still cut or copy a DTensor (one
    of them larger than one), elements are DTensors on those, with Shard(d) now Shard(d - 1); otherwise plain.
    ValueError as before, and where fewer or more rows are held. Source: NeMo Automodel state_dict_utils.

    >>> split_experts_weights_dtensor_aware(torch.eye(2), 2)
    ([tensor([1., 0.]), tensor([0., 1.])], [0, 1])
    """
    local, start, end = get_expert_slice_for_rank(weight, n_experts)
    if local.shape[:1] != (end - start,):
        told = f"to be {end - start}, got shape {tuple(local.shape)}; pass all {n_experts} experts, or a DTensor of all"
        raise ValueError(f"Expected local tensor first dimension {told}")
    experts = [local[i] for i in range(end - start)]
    return (_rewrap(experts, weight) if is_dtensor(weight) else experts), [*range(start, end)]


def validate_dtensor_expert_sharding(tensor: Tensor, expected_experts: int, tensor_name: str = "tensor") -> bool:
    """True: dim 0 of the whole tensor is E, and no mesh dim cuts it but the experts' own; else ValueError.

    The rule for a DTensor: with an `ep` mesh dim, `ep` is Shard(0) or Replicate and no other mesh dim is Shard(0).
    Without an `ep` dim, one mesh dim is Shard(0) or all are Replicate. And E is cut as `expert_range` cuts it.

    >>> validate_dtensor_expert_sharding(torch.ones(4, 2), 4)
    True
    """
    _experts_of(tensor, expected_experts, tensor_name)
    if is_dtensor(tensor):
        placements, names = tensor.placements, tensor.device_mesh.mesh_dim_names or ()
        own = [p for p, name in zip(placements, names, strict=False) if name == "ep"] or placements
        cuts = sum(p.is_shard(0) for p in own)
        if cuts != sum(p.is_shard(0) for p in placements) or not (cuts or all(p.is_replicate() for p in own)):
            raise _unsupported(tensor, tensor_name)
    return True


def create_dtensor_from_local(
    local_tensor: Tensor, device_mesh: DeviceMesh | None, rank: int | None = None, *, shape: Sequence[int] | None = None
) -> Tensor:
    """The DTensor of which local_tensor is this rank's part, `ep` on dim 0 and `ep_shard` on dim 1; no mesh: itself.

    local_tensor [E / ep, D / ep_shard, ...] shares its storage; `ep_shard_slice` makes its dim 1. `ep_shard` and
    `ep_replicate` stay in the mesh only where one of them is larger than one. rank: unless None, local_tensor moves to
    the current CUDA device, if any; its value is not used. shape: the whole [E, D, ...]; without it each rank is taken
    to hold as much as this one (wrong for uneven parts), with it this rank's part is checked. ValueError: mesh dims of
    other name, too few dims, another rank's part, E not cut by `expert_range`.

    >>> create_dtensor_from_local(torch.ones(2), None)
    tensor([1., 1.])
    """
    if device_mesh is None:
        return local_tensor
    from torch.distributed.tensor import DTensor, Replicate, Shard

    if rank is not None and torch.cuda.is_available():
        local_tensor = local_tensor.to(torch.cuda.current_device())
    names = device_mesh.mesh_dim_names or ()
    if not names or not _CUTS.keys() >= set(names):
        raise ValueError(f"mesh dims named {names}, expected names among {list(_CUTS)}; take a slice of {device_mesh}")
    idle = "ep" in names and all(device_mesh.size(i) == 1 for i, name in enumerate(names) if name != "ep")
    mesh = get_submesh(device_mesh, ("ep",)) if idle else device_mesh
    cuts = [_CUTS[name] for name in mesh.mesh_dim_names or ()]
    placements = [Replicate() if dim is None else Shard(dim) for dim in cuts]
    whole = local_tensor.shape if shape is None else torch.Size(shape)
    if any(dim is not None and dim >= len(whole) for dim in cuts):
        raise ValueError(f"a tensor of shape {tuple(whole)} has too few dims for {placements} on {mesh}")
    if shape is None:
        return DTensor.from_local(local_tensor, mesh, placements)
    sizes = {d: len(_part_of_rank(whole[d], mesh, i, experts=d == 0)) for i, d in enumerate(cuts) if d is not None}
    if local_tensor.shape != (part := tuple(sizes.get(d, size) for d, size in enumerate(whole))):
        found = f"{tuple(local_tensor.shape)}, expected {part}, this rank's of {tuple(whole)} on {mesh}"
        raise ValueError(f"local_tensor has shape {found}: cut dim 0 by its expert range, dim 1 by ep_shard_slice")
    # dense, with the dims of the whole nested as local's are: parts of a transposed tensor make a transposed one
    nesting = sorted(range(len(whole)), key=local_tensor.stride().__getitem__, reverse=True)
    stride = torch.empty_permuted(whole, nesting, device="meta").stride()
    return DTensor.from_local(local_tensor, mesh, placements, shape=whole, stride=stride)


def ep_shard_slice(tensor: Tensor, device_mesh: DeviceMesh | None) -> Tensor:
    """tensor[:, i * c : (i + 1) * c], a view, with c = D / n: this process is the i-th of n along `ep_shard`.

    tensor [E, D, ...], plain; itself where the mesh has no `ep_shard`, or one of size one. ValueError for a DTensor
    (it is cut already), fewer than two dims, or D not a multiple of n.

    >>> ep_shard_slice(torch.ones(4, 2), None).shape
    torch.Size([4, 2])
    """
    if device_mesh is None or "ep_shard" not in (device_mesh.mesh_dim_names or ()):
        return tensor
    if (mesh := get_submesh(device_mesh, ("ep_shard",))).size() == 1:
        return tensor
    if is_dtensor(tensor) or tensor.ndim < 2 or tensor.shape[1] % mesh.size():
        found = f"{type(tensor).__name__} of shape {tuple(tensor.shape)}; choose a size that divides dim 1"
        raise ValueError(f"`ep_shard` of size {mesh.size()} cuts dim 1 of a plain tensor in equal parts, got {found}")
    return tensor.chunk(mesh.size(), 1)[_place(mesh)]


def _place(mesh: DeviceMesh, *dim: int) -> int:
    """This process's index along a dim of the mesh, or along the only one."""
    try:
        return mesh.get_local_rank(*dim)
    except (IndexError, RuntimeError) as error:
        raise ValueError(f"no one place for this process in {mesh} ({error}): it must be 1-D or have `ep`") from error


def _part_of_rank(n: int, mesh: DeviceMesh, dim: int, *, experts: bool) -> range:
    """What DTensor's Shard gives this process of range(n) along a mesh dim; of experts, only if our rule agrees."""
    n_ranks, size = mesh.size(dim), -(-n // mesh.size(dim))
    theirs = [range(min(rank * size, n), min((rank + 1) * size, n)) for rank in range(n_ranks)]
    ours = [expert_range(n, n_ranks, rank) for rank in range(n_ranks)]
    if experts and ours != theirs:
        a, b = (" ".join(f"{r.start}:{r.stop}" for r in ranges) for ranges in (ours, theirs))
        raise ValueError(f"{n} experts on {n_ranks} ranks: expert_range {a}, DTensor {b}; use a size that divides {n}")
    return theirs[_place(mesh, dim)]


def _experts_of(tensor: Tensor, n_experts: int, name: str) -> range:
    """The experts that this rank's storage of a tensor [E, ...] holds."""
    if tensor.shape[:1] != (n_experts,):
        found = f"{tuple(tensor.shape)} (of uneven parts? create_dtensor_from_local needs shape=)"
        raise ValueError(f"{name} has shape {found}, expected {brief(n_experts)} experts on dim 0")
    if not is_dtensor(tensor):
        return range(n_experts)
    active = {i: p for i, p in enumerate(tensor.placements) if tensor.device_mesh.size(i) > 1}
    cuts = [i for i, p in active.items() if p.is_shard(0)]
    # Partial is a sum still to be made; a strided shard (neither) holds rows from all over
    if len(cuts) > 1 or not all(p.is_shard() or p.is_replicate() for p in active.values()):
        raise _unsupported(tensor, name)
    return _part_of_rank(n_experts, tensor.device_mesh, cuts[0], experts=True) if cuts else range(n_experts)


def _unsupported(tensor: DTensor, name: str) -> ValueError:
    found = f"{name} has unsupported DTensor placement {tensor.placements} on {tensor.device_mesh}"
    return ValueError(f"{found}: redistribute it to Shard(0) or Replicate on `ep` (else on one dim), no other Shard(0)")


def _rewrap(experts: list[Tensor], weight: DTensor) -> list[Tensor]:
    """Elements of weight on the mesh dims that are not the experts'; plain where those leave nothing to cut or copy."""
    mesh, names = weight.device_mesh, weight.device_mesh.mesh_dim_names or ("",) * weight.device_mesh.ndim
    own = [p.is_shard(0) or (n == "ep" and p.is_replicate()) for n, p in zip(names, weight.placements, strict=True)]
    rest = {i: p for i, p in enumerate(weight.placements) if not own[i]}
    if all(mesh.size(i) == 1 for i in rest):
        return experts
    from torch.distributed.tensor import DTensor, Replicate, Shard

    submesh = mesh if len(rest) == mesh.ndim else get_submesh(mesh, tuple(names[i] for i in rest))
    kept = [Shard(p.dim - 1) if isinstance(p, Shard) else Replicate() for p in rest.values()]
    return [DTensor.from_local(e, submesh, kept, shape=weight.shape[1:], stride=weight.stride()[1:]) for e in experts]


_CUTS = {"ep": 0, "ep_shard": 1, "ep_replicate": None}  # mesh dims, and the dim of an expert tensor that each cuts
held(globals(), error=ValueError)
