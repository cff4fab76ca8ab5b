"""Decides what depends on the compute capability of a card: which quantised weights an engine takes there, and whether
the plan's figures, which vLLM's code gives for one capability, hold for its kernels. A card whose capability is not
known counts as one on which vLLM runs all of it.
"""

from collections.abc import Sequence
from dataclasses import replace

from serve_app.facts.card_capability import Capability, capability_text, card_capability
from serve_app.facts.inventory import Device
from serve_app.planning.model_request import ModelRequest
from serve_app.planning.pipeline.card_groups import Card
from serve_app.planning.shortage import Shortage
from serve_app.planning.unplanned import held_otherwise

# The least that vLLM 0.32 takes by method (`get_min_capability`).
LEAST_IN_VLLM: dict[str, Capability] = {
    "awq": (7, 5), "experts_int8": (8, 0), "fbgemm_fp8": (8, 0), "fp8": (7, 5), "gptq": (6, 0), "mxfp4": (8, 0),
}  # fmt: skip
# transformers (5.19) keeps FP8 in 8 bits from this capability on, and makes it whole below.
LEAST_FP8_IN_PT: Capability = (8, 9)
_COMPRESSED = frozenset({"mla", "sliding_mla"})


def on_cards(request: ModelRequest, devices: Sequence[Device]) -> ModelRequest:
    """Returns the model as vLLM's code has it on the oldest of these cards, where it was asked about them, or as
    transformers has it on cards where it makes FP8 whole, or else the model itself. What was computed of one card is
    kept apart from that of another."""
    if _makes_fp8_whole(request, devices):
        return replace(request, fp8_is_whole=True, memo=request.memo.setdefault("whole fp8", {}))
    known = [card_capability(device.name) for device in devices if device.is_gpu]
    capabilities = [capability for capability in known if capability is not None]
    if not capabilities or not request.engine_facts.others:
        return request
    facts = request.engine_facts.on(min(capabilities))
    if facts is request.engine_facts:
        return request
    return replace(request, engine_facts=facts, memo=request.memo.setdefault(("card", facts.capability), {}))


def oldest_cards(cards: Sequence[Card]) -> frozenset[str]:
    """Returns the ids of the cards of the least known capability, or nothing where fewer than two are known.

    vLLM asks the card of the first stage by which it chooses the number format and the kernels of all its ranks, and
    the plan's figures are those of the oldest card (`on_cards`), so only these may be the first stage.
    """
    known = {card.id: card_capability(card.name) for card in cards}
    capabilities = {capability for capability in known.values() if capability is not None}
    if len(capabilities) < 2:
        return frozenset()
    return frozenset(card for card, capability in known.items() if capability == min(capabilities))


def card_problem(request: ModelRequest, devices: Sequence[Device]) -> Shortage | None:
    """Returns why an engine does not take the model's weights on one of these devices, or a plan does not know what
    they become there, or None."""
    if _makes_fp8_whole(request, devices):
        return None
    find = _vllm_problem if request.config.infer_backend == "vllm" else _pt_problem
    for device in devices:
        if device.is_gpu and (problem := find(request, device)) is not None:
            return problem
    return None


def _makes_fp8_whole(request: ModelRequest, devices: Sequence[Device]) -> bool:
    """Returns whether transformers makes the weights of an FP8 checkpoint whole on each of these cards. It decides by
    one card for all of them, so cards that differ in it are refused."""
    if request.config.infer_backend != "pt" or request.architecture.quantization != "fp8":
        return False
    known = [card_capability(device.name) if device.is_gpu else None for device in devices]
    return all(capability is not None and capability < LEAST_FP8_IN_PT for capability in known)


def _vllm_problem(request: ModelRequest, device: Device) -> Shortage | None:
    method = request.config.quantization or request.architecture.quantization
    least, own = LEAST_IN_VLLM.get(method or ""), card_capability(device.name)
    if least is None or own is None or own >= least:
        return None
    text = (
        f"infer_backend: vllm: {device.id} ({device.name}) has compute capability {capability_text(own)}, and vLLM "
        f"takes {method} weights from {capability_text(least)} on. Use a newer card or other weights."
    )
    return Shortage("vllm_refuses", text, 0)


def _pt_problem(request: ModelRequest, device: Device) -> Shortage | None:
    if request.architecture.quantization != "fp8":
        return None
    own = card_capability(device.name)
    if own is not None and own >= LEAST_FP8_IN_PT:
        return None
    text = f"infer_backend: pt: {device.id} ({device.name}): {held_otherwise('fp8 weights')}"
    return Shortage("not_planned", text, 0)


def knows_kernels(request: ModelRequest, device: Device) -> bool:
    """Returns whether the plan knows vLLM's blocks of KV cache on a card, and its cache in 8 bits. vLLM chooses its
    kernels for MLA and for quantised weights by the card, and the plan knows the choice on the card of vLLM's
    answer."""
    own = card_capability(device.name)
    if not device.is_gpu or own is None or own == request.engine_facts.capability:
        return True
    ranks = request.vllm_facts.ranks.values() if request.vllm_facts is not None else ()
    is_compressed = "mla" in request.architecture.layers or any(
        layer.kind in _COMPRESSED for rank in ranks for layer in rank.cache
    )
    return not is_compressed and request.architecture.quantization is None
