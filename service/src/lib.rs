//! seckill: decides once, without overselling, who gets the units of a flash sale.

pub mod config;
pub mod orders;
pub mod shift;
pub mod topology;
