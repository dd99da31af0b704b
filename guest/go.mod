module fused

go 1.27
