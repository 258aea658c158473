"""Rules of tokens that are predicted after the next. Standard library only."""

from moe.settings import LossSettings, ModelSettings


def ahead_problems(model: ModelSettings, loss: LossSettings, length: int) -> list[str]:
    """How many there are, and what they need.

    Args:
        model: flat words.
        loss: weights of the losses.
        length: L, tokens of a row.
    """
    ahead, default = model.predict_ahead, LossSettings.ahead_weight
    if not ahead:
        if loss.ahead_weight == default:
            return []
        return [
            f"AHEAD_LOSS_FACTOR = {loss.ahead_weight} means nothing to PREDICT_AHEAD = "
            f"0: leave it at {default}"
        ]
    found = []
    if not 0 < ahead < length:
        found.append(
            f"PREDICT_AHEAD = {ahead}: must be from 1 to {length - 1}, less than a "
            f"row's {length} tokens; 0 predicts the next alone"
        )
    if model.shape != "decoder":
        found.append(
            f"PREDICT_AHEAD = {ahead} is for ARCHITECTURE = 'decoder', not "
            f"{model.shape!r}: set it to 0"
        )
    if model.norm_place != "before":
        found.append(
            f"PREDICT_AHEAD = {ahead} joins what is normalised: use NORM_PLACE = "
            f"'before', not {model.norm_place!r}"
        )
    if model.output_transform:
        found.append(
            f"PREDICT_AHEAD = {ahead} reads what OUTPUT_TRANSFORM = True has not "
            "transformed yet: set one of them to another"
        )
    return found
