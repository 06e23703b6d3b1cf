"""Log-likelihoods of texts, and multiple choice by them."""
