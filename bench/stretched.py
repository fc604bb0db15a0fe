"""A cost profile of a slower machine: all of its times longer by one factor."""

import msgspec

from shared.profiles import Coefficients, CostProfile, Curve, DecodeCost


def stretched(profile: CostProfile, factor: float) -> CostProfile:
    """Every iteration takes `factor` times as long; memory and counts are as they were."""
    parts = profile.coefficients

    def curve(one: Curve) -> Curve:
        values = tuple(factor * value for value in one.values)
        return Curve(one.knots, values, factor * one.slope_after)

    def decode(one: DecodeCost) -> DecodeCost:
        return DecodeCost(
            slope=curve(one.slope),
            per_sequence_s=factor * one.per_sequence_s,
            fixed_s=factor * one.fixed_s,
            bend_tokens=one.bend_tokens,
            beyond_bend_s=factor * one.beyond_bend_s,
        )

    return msgspec.structs.replace(
        profile,
        name=f"{profile.name}-x{factor:g}",
        coefficients=Coefficients(
            tokens=curve(parts.tokens),
            prefill_attention=curve(parts.prefill_attention),
            decode=decode(parts.decode),
            mixed=None if parts.mixed is None else decode(parts.mixed),
            per_prefill_token_s=factor * parts.per_prefill_token_s,
            prefill_fixed_s=factor * parts.prefill_fixed_s,
        ),
        overhead_s=factor * profile.overhead_s,
        overhead_per_sequence_s=factor * profile.overhead_per_sequence_s,
    )
