"""BibTeX of what the theory uses."""

from __future__ import annotations

from collections.abc import Iterable

from theory.bounds import BOUNDS

#: key -> BibTeX entry. The bounds themselves are this project's derivations; see ``docs/derivations``.
ENTRIES: dict[str, str] = {
    "ma2026fedgmr": """@inproceedings{ma2026fedgmr,
  title         = {Breaking the Capacity Bottleneck in Model-Heterogeneous Federated Learning via
                   Gradual Model Restoration},
  author        = {Ma, Chengjie and Oh, Seungeun and Park, Jihong and Kim, Seong-Lyun},
  booktitle     = {International Conference on Machine Learning ({ICML})},
  year          = {2026},
  eprint        = {2512.05372},
  archivePrefix = {arXiv},
  primaryClass  = {cs.DC}
}""",
    "zhou2023": """@inproceedings{zhou2023,
  title     = {Every Parameter Matters: Ensuring the Convergence of Federated Learning with Dynamic
               Heterogeneous Models Reduction},
  author    = {Zhou, Hanhan and Lan, Tian and Venkataramani, Guru Prasadh and Ding, Wenbo},
  booktitle = {Advances in Neural Information Processing Systems},
  volume    = {36},
  pages     = {25991--26002},
  year      = {2023},
  note      = {arXiv:2310.08670}
}""",
    "nguyen2022": """@inproceedings{nguyen2022,
  title     = {Federated Learning with Buffered Asynchronous Aggregation},
  author    = {Nguyen, John and Malik, Kshitiz and Zhan, Hongyuan and Yousefpour, Ashkan and Rabbat, Mike and
               Malek, Mani and Huba, Dzmitry},
  booktitle = {International Conference on Artificial Intelligence and Statistics},
  year      = {2022},
  note      = {arXiv:2106.06639}
}""",
    "stich2018": """@inproceedings{stich2018,
  title     = {Sparsified {SGD} with Memory},
  author    = {Stich, Sebastian U. and Cordonnier, Jean-Baptiste and Jaggi, Martin},
  booktitle = {Advances in Neural Information Processing Systems},
  volume    = {31},
  pages     = {4447--4458},
  year      = {2018},
  note      = {arXiv:1809.07599}
}""",
    "nesterov2018": """@book{nesterov2018,
  title     = {Lectures on Convex Optimization},
  author    = {Nesterov, Yurii},
  edition   = {2},
  publisher = {Springer},
  year      = {2018}
}""",
    "kuensch1989": r"""@article{kuensch1989,
  title   = {The Jackknife and the Bootstrap for General Stationary Observations},
  author  = {K{\"u}nsch, Hans R.},
  journal = {The Annals of Statistics},
  volume  = {17},
  number  = {3},
  pages   = {1217--1241},
  year    = {1989}
}""",
}

#: Cited whatever is used: the method that the theory is about.
ALWAYS = ("ma2026fedgmr",)


def cite(bounds: Iterable[str] | None = None) -> str:
    """BibTeX for the method and for the steps that `bounds` rest on (all of them when None).

    Raises:
        KeyError: there is no such bound.
    """
    chosen = BOUNDS.values() if bounds is None else [BOUNDS[name] for name in bounds]
    used = {key for bound in chosen for key in bound.source if key != "ours"}
    if bounds is None:
        used.add("kuensch1989")
    return "\n\n".join(entry for key, entry in ENTRIES.items() if key in used or key in ALWAYS) + "\n"
