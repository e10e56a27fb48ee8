"""From the artifacts of a validation to `validation.json`: every study in one shape, for networks and language alike.

    statistics  a mean with its interval
    solved      what there is without a measured response
    networks    what the steps of small networks found
    language    what the steps of language models found
    document    the whole of it, with settings, versions, hardware and timings

`validation.json` holds `name`, `subject`, `config`, `versions`, `hardware`, `date`, `seconds`, `stages`, `artifacts`,
and `studies`, each there only where it was done. S is a statistic: `mean`, `interval` ([low, high], 95 %, or
null) and `values` (of single measurements or queries, may be empty); S? may be null. METHOD is `identity`, `kfac`,
`ekfac`, `lissa`, `ekfac_cg`, `exact`, `ekfac_blocks_2` ..., `bm25`, `bm25_ekfac`, `bm25_ekfac_cg` or `random`.

- `model`: `kind` (network, language or facts), `facts`: pairs of a name and a value for people, `warnings`.
- `agreement`: with the measured response of the proximal Bregman objective (Equation 7): `points`, `measurements`,
  `methods`: METHOD: {`pearson`: S, `spearman`: S, `slope`: S?, `exact`: S?, the correlation with exact solves,
  `converged`: S?, Pearson's correlation over converged points alone}, `differences`: {"ekfac - lissa": S ...}.
- `solved`: in its place where no response was measured, with exact solves: `points`, `measurements`, `methods`: METHOD:
  {`pearson`: S, `spearman`: S, `slope`: S?}, `differences`.
- `response`: how it was measured: `epsilon`, `linearity`, `gradients`, `tolerance`, `converged`, `facts`, `warnings`.
- `cost`: `measurements`, `threads`, `methods`: METHOD: {`seconds` and `cpu_seconds`: {`fit`, `solve`, ..., `total`},
  `bytes`, `products`, `residual`, `notes`}.
- `iterations`: of conjugate gradients, each {`iterations`, `pearson`: S?, with the response, `lds`: S?}.
- `datamodels`: `subsets`, `share`, `retrainings`, `unit`, `methods`: METHOD: {`lds`: S, `tests`: S?, `difference`: S?},
  `ceiling`: S?, `dampings`: each {`multiple`, `damping`, `methods`, `differences`: METHOD: S}.
- `removal`: `share`, `dropped`, `retrainings`, `unit`, `measured`, `methods`: METHOD: {`change`: S, `over_random`: S?,
  `over_bm25`: S?, `wins`}.
- `tracing`: `k`, `documents`, `queries`, `methods`: METHOD: {`recall`: S, `reciprocal_rank`: S, `difference`: S?}.
- `blocks`: `truth`, `timed`, `rows`: each {`blocks`, `agreement`: S, `minimum`, `bytes`, `relative_bytes`, `seconds`}.
- `ranks`: `rows`: each {`name`, `rank`, `fidelity`, `mean_rank`, `pearson`: S, `minimum`, `predicted`, `bytes`,
  `relative_bytes`, `seconds`}.
- `sizes`: `solver`, `total`, `unit`, `rows`: each {`size`, `between`: S, `with_full`: S}.
- `scale`: `weight`, `lines`: each {`against`, `steps`, `method`, `slope`: S, `correlation`: S}, `pairs`.
"""
