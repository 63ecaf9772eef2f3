"""BibTeX of what a run of fedgmr builds on."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from fedgmr_plugin import __version__

_METHOD = """\
@inproceedings{ma2026fedgmr,
  title         = {Breaking the Capacity Bottleneck in Model-Heterogeneous Federated Learning via
                   Gradual Model Restoration},
  author        = {Ma, Chengjie and Oh, Seungeun and Park, Jihong and Kim, Seong-Lyun},
  booktitle     = {International Conference on Machine Learning ({ICML})},
  year          = {2026},
  eprint        = {2512.05372},
  archivePrefix = {arXiv},
  primaryClass  = {cs.DC}
}"""

_SOFTWARE = """\
@software{fedgmr,
  title   = {fedgmr: {FedGMR} as an extension of {FedML}},
  author  = {{The fedgmr authors}},
  version = {%s},
  year    = {2026},
  license = {Apache-2.0}
}"""

_HOST = """\
@misc{he2020fedml,
  title         = {{FedML}: A Research Library and Benchmark for Federated Machine Learning},
  author        = {He, Chaoyang and Li, Songze and So, Jinhyun and Zeng, Xiao and Zhang, Mi and
                   Wang, Hongyi and Wang, Xiaoyang and Vepakomma, Praneeth and Singh, Abhishek and
                   Qiu, Hang and Zhu, Xinghua and Wang, Jianzong and Shen, Li and Zhao, Peilin and
                   Kang, Yan and Liu, Yang and Raskar, Ramesh and Yang, Qiang and Annavaram, Murali and
                   Avestimehr, Salman},
  year          = {2020},
  eprint        = {2007.13518},
  archivePrefix = {arXiv},
  primaryClass  = {cs.LG}
}"""


#: The papers of the methods that FedGMR is compared with; each entry's key ends in its method's name.
PEERS = Path(__file__).parent / "methods" / "peers.bib"


def cite(*methods: str) -> str:
    """BibTeX of the method (FedGMR), this software and its host (FedML), and of other methods.

    Args:
        methods: what ``method`` in ``fedgmr_args`` takes, such as ``fedavg`` or ``heterofl+gmr``; each paper
            is cited once, and names that are none have no paper.
    """
    wanted = {method.partition("+")[0] for method in methods}
    others = [entry for method, entry in _peers().items() if method in wanted]
    return "\n\n".join((_METHOD, _SOFTWARE % __version__, _HOST, *others)) + "\n"


@cache
def _peers() -> dict[str, str]:
    """Entries by method, in the order of the file."""
    entries = PEERS.read_text(encoding="utf-8").strip().split("\n\n")
    return {re.match(r"@\w+\{[a-z]+\d{4}(\w+),", entry)[1]: entry for entry in entries}  # type: ignore[index]
