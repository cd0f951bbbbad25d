"""Losses under the names and with the arguments of other libraries, one module for each: change the import, keep the
code.

    from fastcl.integrations.lightly import NTXentLoss
    from fastcl.integrations.open_clip import ClipLoss, SigLipLoss
    from fastcl.integrations.pytorch_metric_learning import NTXentLoss, SupConLoss
    from fastcl.integrations.sentence_transformers import MultipleNegativesRankingLoss

They are compositions of the losses of this package: same value and gradient as the original, no matrix of similarities.
None of these libraries is imported. What differs on purpose is said in each class.
"""
