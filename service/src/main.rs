//! seckill: a flash-sale service.
fn main() {}
