//! seckill: decides once, without overselling, who gets the units of a flash sale.

pub mod config;
pub mod inventory;
pub mod orders;
pub mod topology;
