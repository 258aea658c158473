"""What papers say of the models of `configs/models`: numbers of parameters.

GLaM: arXiv:2112.06905, table 4; GPT-3: arXiv:2005.14165, table D.1; Switch:
arXiv:2101.03961, tables 7 and 9; T5: arXiv:1910.10683, section 3.7. Of the others the
file of the model names the paper, and says where its sizes are from.
"""

import dataclasses
from typing import Literal

_B, _M = 10**9, 10**6


@dataclasses.dataclass(frozen=True)
class Published:
    """Parameters of a model as they were published.

    Attributes:
        total: parameters in all; None where none was published, or none was read.
        active: those that a token meets, where a paper says so.
        why: why the total differs by more than two percent; "" where it does not.
        why_active: the same of those that a token meets.
        without_embedding: whether the active parameters leave the input embedding out.
        sizes: where the sizes are from: "read" in the paper, its code or what quotes
            them; "memory" of it, in part or whole; "inferred" from the count;
            "stand-in": none was ever published.
    """

    total: float | None
    active: float | None = None
    why: str = ""
    why_active: str = ""
    without_embedding: bool = False
    sizes: Literal["read", "memory", "inferred", "stand-in"] = "read"


_SAME_GAP = "as `glam_0_1b`"
_NO_TABLES = "neither embedding is in what was published, as it seems"

PUBLISHED = {
    "t5_small": Published(60 * _M),
    "t5_base": Published(220 * _M),
    "t5_large": Published(
        770 * _M, why="770M counts the embedding twice; Switch's paper has 739M"
    ),
    "t5_3b": Published(2.8 * _B),
    "t5_11b": Published(11 * _B, why="11B rounds 11.3B"),
    "t5_1_1_small": Published(None, sizes="memory"),
    "t5_1_1_base": Published(None, sizes="memory"),
    "t5_1_1_large": Published(None, sizes="memory"),
    "t5_1_1_xl": Published(None, sizes="memory"),
    "t5_1_1_xxl": Published(11.1 * _B),
    "switch_base_8": Published(None),
    "switch_base_16": Published(1.1 * _B, why="1.1B rounds 1.07B"),
    "switch_base_32": Published(2 * _B),
    "switch_base_64": Published(3.8 * _B),
    "switch_base_128": Published(7.41 * _B),
    "switch_base_256": Published(14.7 * _B),
    "switch_large": Published(26 * _B),
    "switch_xxl": Published(395 * _B),
    "switch_c": Published(1_571 * _B),
    "switch_c_decoder": Published(1_571 * _B, sizes="stand-in"),
    "st_moe_l": Published(4.1 * _B),
    "st_moe_32b": Published(269 * _B),
    "gshard_600b": Published(
        600 * _B, why="600B rounds it; arXiv:2104.10350 has 619B", sizes="inferred"
    ),
    "glam_0_1b": Published(
        130 * _M, why="12 M² less than a vocabulary of 32,000 needs; unexplained"
    ),
    "glam_0_1b_64e": Published(1.9 * _B, 145 * _M, why_active=_SAME_GAP),
    "glam_1_7b": Published(1.7 * _B),
    "glam_1_7b_32e": Published(
        20 * _B, 1_878 * _M, why="20B does not follow from the sizes: a misprint"
    ),
    "glam_1_7b_64e": Published(27 * _B, 1_879 * _M),
    "glam_1_7b_128e": Published(53 * _B, 1_881 * _M),
    "glam_1_7b_256e": Published(105 * _B, 1_886 * _M),
    "glam_8b": Published(8.7 * _B),
    "glam_8b_64e": Published(143 * _B, 9.8 * _B),
    "glam_137b": Published(137 * _B),
    "glam_64b_64e": Published(1_200 * _B, 96.6 * _B, why="1.2T rounds 1.162T"),
    "flan_137b": Published(137 * _B, sizes="memory"),
    "bert_base": Published(110 * _M, sizes="memory"),
    "bert_large": Published(340 * _M, sizes="memory"),
    "gpt2_124m": Published(
        117 * _M, why="117M was a mistake: OpenAI later said 124M", sizes="memory"
    ),
    "gpt2_355m": Published(
        345 * _M, why="345M was a mistake: OpenAI later said 355M", sizes="memory"
    ),
    "gpt2_774m": Published(762 * _M, sizes="memory"),
    "gpt2_1_5b": Published(1_542 * _M, sizes="memory"),
    "gpt3_125m": Published(125 * _M, sizes="memory"),
    "gpt3_350m": Published(356 * _M, sizes="memory"),
    "gpt3_760m": Published(760 * _M, sizes="memory"),
    "gpt3_1_3b": Published(1.32 * _B, sizes="memory"),
    "gpt3_2_7b": Published(2.65 * _B, sizes="memory"),
    "gpt3_6_7b": Published(6.66 * _B, sizes="memory"),
    "gpt3_13b": Published(12.85 * _B, sizes="memory"),
    "gpt3_175b": Published(174.6 * _B, sizes="memory"),
    "megatron_8_3b": Published(8.3 * _B, sizes="memory"),
    "turing_nlg_17b": Published(17.2 * _B, sizes="memory"),
    "mt_nlg_530b": Published(530 * _B, sizes="memory"),
    "pangu_alpha_2_6b": Published(2.6 * _B),
    "pangu_alpha_13b": Published(13.1 * _B, sizes="memory"),
    "pangu_alpha_200b": Published(207 * _B),
    "pangu_nlp_100b_proxy": Published(100 * _B, sizes="stand-in"),
    "yuan_1_245b": Published(245.73 * _B, sizes="memory"),
    "ernie_3_10b": Published(10 * _B, sizes="memory"),
    "ernie_3_titan_260b": Published(260 * _B, sizes="inferred"),
    "plug_27b": Published(
        27 * _B, why="the sizes that were released give no more; unexplained"
    ),
    "m6_327m": Published(327 * _M, sizes="memory"),
    "m6_dense_10b": Published(10 * _B, sizes="memory"),
    "m6_t_1b": Published(1.4 * _B, sizes="memory"),
    "m6_t_10b": Published(10.8 * _B, sizes="memory"),
    "m6_t_100b": Published(103.2 * _B, sizes="memory"),
    "m6_t_250b": Published(250 * _B, sizes="inferred"),
    "m6_t_1t": Published(1_002.7 * _B, sizes="memory"),
    "m6_10t": Published(10_000 * _B, sizes="memory"),
    "m6_10t_shared": Published(None, sizes="memory"),
    "cpm_2_11b": Published(11 * _B, sizes="inferred"),
    "cpm_2_moe_198b": Published(198 * _B, sizes="inferred"),
    "wudao_1_75t_proxy": Published(1_750 * _B, sizes="stand-in"),
    "mixtral_8x7b": Published(46.7 * _B, 12.9 * _B),
    "mixtral_8x22b": Published(141 * _B, 39 * _B),
    "olmoe_1b_7b": Published(6.9 * _B, 1.3 * _B),
    "deepseekmoe_16b": Published(16.4 * _B, 2.8 * _B, sizes="memory"),
    "deepseek_v3": Published(671 * _B, 37 * _B),
    "kimi_k2": Published(1_040 * _B, 32.6 * _B),
    "qwen1_5_moe_a2_7b": Published(14.3 * _B, 2.7 * _B, sizes="memory"),
    "qwen3_30b_a3b": Published(30.5 * _B, 3.3 * _B),
    "qwen3_235b_a22b": Published(235 * _B, 22 * _B),
    "gpt_oss_20b": Published(20.91 * _B, 3.61 * _B, without_embedding=True),
    "gpt_oss_120b": Published(116.83 * _B, 5.13 * _B, without_embedding=True),
    "llama4_maverick": Published(400 * _B, 17 * _B),
    "glm_4_5": Published(355 * _B, 32 * _B, why_active=_NO_TABLES, sizes="memory"),
    "glm_4_5_air": Published(106 * _B, 12 * _B, why_active=_NO_TABLES, sizes="memory"),
    "minimax_m2": Published(230 * _B, 10 * _B, why_active=_NO_TABLES, sizes="memory"),
}
