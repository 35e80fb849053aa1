//! etcd, one member.

use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::error::PartError;
use crate::process::{Invocation, Lifetime, find_program};
use crate::server::{Data, Server, data_folder, folder, lifecycle, on_ports};

/// How long one health request may take while a server starts.
const HEALTH_WAIT: Duration = Duration::from_secs(2);

/// How to run a member.
#[derive(Debug, Clone, Default)]
pub struct EtcdOptions {
    /// Who it lives for.
    pub lifetime: Lifetime,
    /// More options, which win over ours: `--heartbeat-interval=50`.
    pub extra: Vec<String>,
}

/// An etcd server.
#[derive(Debug)]
pub struct Etcd {
    port: u16,
    server: Server,
}

impl Etcd {
    /// Starts a server in `dir`; it is healthy (has a leader) when this returns.
    pub async fn start(dir: &Path) -> Result<Etcd, PartError> {
        Etcd::start_with(dir, &EtcdOptions::default()).await
    }

    /// Starts a server with options.
    pub async fn start_with(dir: &Path, options: &EtcdOptions) -> Result<Etcd, PartError> {
        let dir = folder(dir)?;
        on_ports(&dir, |ports, data| Etcd::on_ports(&dir, ports, data, options)).await
    }

    async fn on_ports(
        dir: &Path,
        [port, peer]: [u16; 2],
        data: Data,
        options: &EtcdOptions,
    ) -> Result<Etcd, PartError> {
        let program =
            find_program("etcd").ok_or(PartError::Missing { program: "etcd", package: "etcd-server" })?;
        let folder = data_folder(dir, data)?;
        let client_url = format!("http://127.0.0.1:{port}");
        let peer_url = format!("http://127.0.0.1:{peer}");
        let mut args = vec![
            "--name=single".to_owned(),
            format!("--data-dir={}", folder.display()),
            format!("--listen-client-urls={client_url}"),
            format!("--advertise-client-urls={client_url}"),
            format!("--listen-peer-urls={peer_url}"),
            format!("--initial-advertise-peer-urls={peer_url}"),
            format!("--initial-cluster=single={peer_url}"),
            "--logger=zap".to_owned(),
            "--log-level=warn".to_owned(),
        ];
        args.extend(options.extra.iter().cloned());
        let invocation =
            Invocation { program, args, env: Vec::new(), dir: dir.to_owned(), log: dir.join("etcd.log") };
        let server = Server::spawn("etcd", invocation, options.lifetime)?;
        let etcd = Etcd { port, server };
        etcd.server.ready(|| etcd.answers()).await?;
        Ok(etcd)
    }

    async fn answers(&self) -> Result<(), String> {
        let ask = async {
            let mut stream = TcpStream::connect(self.address()).await?;
            stream.write_all(b"GET /health HTTP/1.0\r\n\r\n").await?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await?;
            Ok::<String, std::io::Error>(answer)
        };
        match tokio::time::timeout(HEALTH_WAIT, ask).await {
            Ok(Ok(answer)) if answer.contains("\"health\":\"true\"") => Ok(()),
            Ok(Ok(answer)) => Err(answer.lines().last().unwrap_or("an empty answer").to_owned()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err("no answer to /health".to_owned()),
        }
    }

    /// Its port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The URL for clients: `http://127.0.0.1:PORT`.
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }
}

lifecycle!(Etcd);
