//! seckill: decides once, without overselling, who gets the units of a flash sale.

pub mod admission;
pub mod app;
pub mod archive;
pub mod audit;
mod boot;
pub mod cli;
pub mod config;
pub mod cross_center;
pub mod embedded;
mod fail_point;
pub mod http;
pub mod inventory;
pub mod orders;
#[cfg(test)]
mod patience;
pub mod shift;
pub mod tasks;
pub mod telemetry;
pub mod topology;
