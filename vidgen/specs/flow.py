"""Flow-matching schedulers as checkpoints name them in scheduler_config.json. No torch.

Refuses by name what we do not sample with; how the levels are spaced is `vidgen.sampling.flow`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vidgen.errors import CheckpointError
from vidgen.specs.config import file_of, one_of, refuse

SAMPLERS = {"UniPCMultistepScheduler": "unipc", "FlowMatchEulerDiscreteScheduler": "euler"}


@dataclass(frozen=True, slots=True)
class FlowScheduler:
    """A flow-matching schedule and its solver, named as in scheduler_config.json, with `shift` for UniPC's flow_shift.

    The defaults are those of the schedulers' own. CheckpointError for a value that cannot be.
    """

    sampler: str = "unipc"
    num_train_timesteps: int = 1000
    shift: float = 1.0
    shift_terminal: float | None = None
    final_sigmas_type: str = "zero"
    solver_order: int = 2
    solver_type: str = "bh2"
    lower_order_final: bool = True
    disable_corrector: tuple[int, ...] = ()
    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    time_shift_type: str = "exponential"
    invert_sigmas: bool = False

    def __post_init__(self) -> None:
        allowed: dict[str, tuple[Any, ...]] = {
            "sampler": tuple(SAMPLERS.values()),
            "final_sigmas_type": ("zero", "sigma_min"),
            "solver_order": (1, 2, 3),
            "solver_type": ("bh1", "bh2"),
            "time_shift_type": ("exponential", "linear"),
        }
        for key, values in allowed.items():
            if getattr(self, key) not in values:
                shown = ", ".join(map(str, values))
                raise CheckpointError(f"{file_of('scheduler')}: {key} is {getattr(self, key)!r}; allowed: {shown}")
        if self.solver_order > 1 and self.final_sigmas_type == "zero" and not self.lower_order_final:
            raise CheckpointError(
                f"{file_of('scheduler')}: lower_order_final is false; solver_order {self.solver_order} down to a final "
                "sigma of zero needs it, because the log-SNR is infinite there"
            )


def flow_scheduler(config: Mapping[str, Any], where: str = file_of("scheduler")) -> FlowScheduler:
    """The schedule and solver of a FlowMatchEulerDiscreteScheduler or a UniPCMultistepScheduler with flow sigmas.

    Betas, timestep spacing and sigma bounds are passed over: flow sigmas do not depend on them. CheckpointError names
    what we do not sample with.
    """
    name = one_of(config, "_class_name", tuple(SAMPLERS), where)
    unipc = SAMPLERS[name] == "unipc"
    if unipc:
        one_of(config, "use_flow_sigmas", (True,), where)
        one_of(config, "prediction_type", ("flow_prediction",), where)
        one_of(config, "predict_x0", (True,), where, default=True)
        refuse(config, ("use_dynamic_shifting", "invert_sigmas"), where, "a schedule")
    spacings = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
    refuse(config, (*spacings, "stochastic_sampling", "thresholding", "solver_p"), where, "a schedule")
    read: dict[str, Any] = {
        "num_train_timesteps": config.get("num_train_timesteps", 1000),
        "shift": config.get("flow_shift" if unipc else "shift", 1.0),
        "shift_terminal": config.get("shift_terminal"),
    }
    names: tuple[str, ...]
    if unipc:
        names = ("final_sigmas_type", "solver_order", "solver_type", "lower_order_final")
        read["disable_corrector"] = tuple(config.get("disable_corrector") or ())
    else:
        names = ("use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
        names = (*names, "time_shift_type", "invert_sigmas")
    read |= {key: config[key] for key in names if config.get(key) is not None}
    return FlowScheduler(sampler=SAMPLERS[name], **read)
