"""BibTeX of what a run of fedgmr builds on."""

from __future__ import annotations

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


def cite() -> str:
    """Three BibTeX entries: the method (FedGMR), this software, and its host (FedML)."""
    return "\n\n".join((_METHOD, _SOFTWARE % __version__, _HOST)) + "\n"
