//! TLS between centers: what the internal listener shows and asks for, and whom callers believe.
//!
//! Both ends are ours, so TLS 1.3 alone is spoken. Signatures stay what they are: TLS hides calls and answers and
//! shows the caller that the answer comes from the other center; who sent a call is still its signature's to say.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::future::BoxFuture;
use http::Uri;
use hyper_util::client::legacy::connect::{Connected, Connection, HttpConnector};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::rustls::client::verify_server_name;
use tokio_rustls::rustls::crypto::{CryptoProvider, ring};
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::server::{ParsedCertificate, VerifierBuilderError, WebPkiClientVerifier};
use tokio_rustls::rustls::sign::CertifiedKey;
use tokio_rustls::rustls::version::TLS13;
use tokio_rustls::rustls::{self, ClientConfig, RootCertStore, ServerConfig};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};
use tower::Service;

/// A handshake that is not done after this long is given up: it takes two round trips.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(2);
/// What a listener waits for at most: a caller across the world, with packets lost.
const ACCEPT_TIMEOUT: Duration = Duration::from_secs(10);

/// Why files make no TLS.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum TlsError {
    /// No `BEGIN CERTIFICATE` that can be read.
    #[error("holds no certificate in PEM form")]
    NoCertificate,
    /// No private key that can be read.
    #[error("holds no private key in PEM form (one that is encrypted cannot be used)")]
    NoKey,
    /// The key is another certificate's.
    #[error("is not the key of the certificate")]
    KeyMismatch,
    /// Callers would refuse the certificate.
    #[error("holds a certificate that does not name {name}, under which others dial this center")]
    NameMissing {
        /// The host of `internal_url`.
        name: String,
    },
    /// Anything else that the library does not take.
    #[error("cannot be used: {0}")]
    Unusable(String),
}

fn unusable(error: impl std::fmt::Display) -> TlsError {
    TlsError::Unusable(error.to_string())
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// Authorities: certificates of somebody's are believed if one of these signed them.
#[derive(Debug, Clone)]
pub struct Authorities(Arc<RootCertStore>);

impl Authorities {
    /// Those in a PEM file.
    pub fn of_pem(pem: &[u8]) -> Result<Authorities, TlsError> {
        let mut roots = RootCertStore::empty();
        for certificate in certificates(pem)? {
            roots.add(certificate).map_err(unusable)?;
        }
        Ok(Authorities(Arc::new(roots)))
    }

    /// Those of the system. Where it has none, nobody is believed.
    pub fn of_system() -> Authorities {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        Authorities(Arc::new(roots))
    }
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    found.ok().filter(|found| !found.is_empty()).ok_or(TlsError::NoCertificate)
}

/// A center's certificate with those between it and its authority, and the certificate's key.
#[derive(Debug, Clone)]
pub struct Identity(Arc<CertifiedKey>);

impl Identity {
    /// The chain, the center's own certificate first.
    pub fn chain(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
        certificates(pem)
    }

    /// The chain with its key, where they fit.
    pub fn new(chain: Vec<CertificateDer<'static>>, key_pem: &[u8]) -> Result<Identity, TlsError> {
        let key = PrivateKeyDer::from_pem_slice(key_pem).map_err(|_| TlsError::NoKey)?;
        let key = provider().key_provider.load_private_key(key).map_err(unusable)?;
        let identity = CertifiedKey::new(chain, key);
        match identity.keys_match() {
            Ok(()) => Ok(Identity(Arc::new(identity))),
            Err(rustls::Error::InconsistentKeys(_)) => Err(TlsError::KeyMismatch),
            Err(error) => Err(unusable(error)),
        }
    }

    /// Whether callers that dial this host will take the certificate for its.
    pub fn names(&self, host: &str) -> Result<(), TlsError> {
        let missing = || TlsError::NameMissing { name: host.to_owned() };
        let name = server_name(host).ok_or_else(missing)?;
        let own = self.0.end_entity_cert().map_err(unusable)?;
        let own = ParsedCertificate::try_from(own).map_err(unusable)?;
        verify_server_name(&own, &name).map_err(|_| missing())
    }
}

/// The name in a certificate that a URL's host stands for.
fn server_name(host: &str) -> Option<ServerName<'static>> {
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    ServerName::try_from(bare.to_owned()).ok()
}

/// The listener's half.
#[derive(Debug, Clone)]
pub struct ListenerTls(Arc<ServerConfig>);

impl ListenerTls {
    /// Shows a certificate. With `callers`, whoever calls must show one, too, that these authorities signed.
    pub fn new(identity: &Identity, callers: Option<Authorities>) -> Result<ListenerTls, TlsError> {
        let builder = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .map_err(unusable)?;
        let builder = match callers {
            None => builder.with_no_client_auth(),
            Some(Authorities(roots)) => {
                let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider()).build();
                builder.with_client_cert_verifier(verifier.map_err(|error| match error {
                    VerifierBuilderError::NoRootAnchors => TlsError::NoCertificate,
                    error => unusable(error),
                })?)
            }
        };
        let mut config = builder
            .with_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(Arc::clone(&identity.0))));
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(ListenerTls(Arc::new(config)))
    }

    /// Shakes hands on a connection, in bounded time.
    pub async fn accept(&self, stream: TcpStream) -> io::Result<server::TlsStream<TcpStream>> {
        let acceptor = TlsAcceptor::from(Arc::clone(&self.0));
        tokio::time::timeout(ACCEPT_TIMEOUT, acceptor.accept(stream)).await?
    }
}

/// The caller's half.
#[derive(Debug, Clone)]
pub struct CallerTls(Arc<ClientConfig>);

impl CallerTls {
    /// Believes certificates that these authorities signed, and shows the center's own where it is asked for one.
    pub fn new(believed: Authorities, identity: Option<Identity>) -> Result<CallerTls, TlsError> {
        let builder = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .map_err(unusable)?
            .with_root_certificates(believed.0);
        let mut config = match identity {
            None => builder.with_no_client_auth(),
            Some(Identity(own)) => {
                builder.with_client_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(own)))
            }
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(CallerTls(Arc::new(config)))
    }
}

/// Connects to `http://` and, where it knows how, `https://`.
#[derive(Clone)]
pub(super) struct Connector {
    tcp: HttpConnector,
    tls: Option<CallerTls>,
}

impl Connector {
    pub(super) fn new(mut tcp: HttpConnector, tls: Option<CallerTls>) -> Connector {
        tcp.enforce_http(false);
        Connector { tcp, tls }
    }
}

impl Service<Uri> for Connector {
    type Response = TokioIo<Stream>;
    type Error = Box<dyn std::error::Error + Send + Sync>;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.tcp.poll_ready(context).map_err(Into::into)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let secured = uri.scheme_str() == Some("https");
        let host = uri.host().unwrap_or_default().to_owned();
        let (connecting, tls) = (self.tcp.call(uri), self.tls.clone());
        Box::pin(async move {
            if !secured {
                return Ok(TokioIo::new(Stream::Plain(connecting.await?.into_inner())));
            }
            let CallerTls(config) = tls.ok_or("this center is not set up for https://")?;
            let name = server_name(&host).ok_or_else(|| format!("{host:?} is no name for a certificate"))?;
            let tcp = connecting.await?.into_inner();
            let shaking = TlsConnector::from(config).connect(name, tcp);
            let stream = tokio::time::timeout(HANDSHAKE_TIMEOUT, shaking).await??;
            Ok(TokioIo::new(Stream::Secured(Box::new(stream))))
        })
    }
}

/// A connection to another center.
pub(super) enum Stream {
    /// In plain text.
    Plain(TcpStream),
    /// Over TLS.
    Secured(Box<client::TlsStream<TcpStream>>),
}

impl Connection for Stream {
    fn connected(&self) -> Connected {
        match self {
            Stream::Plain(tcp) => tcp.connected(),
            Stream::Secured(tls) => {
                let (tcp, session) = tls.get_ref();
                let connected = tcp.connected();
                match session.alpn_protocol() {
                    Some(b"h2") => connected.negotiated_h2(),
                    _ => connected,
                }
            }
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain(tcp) => Pin::new(tcp).poll_read(context, buffer),
            Stream::Secured(tls) => Pin::new(tls).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Stream::Plain(tcp) => Pin::new(tcp).poll_write(context, bytes),
            Stream::Secured(tls) => Pin::new(tls).poll_write(context, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Stream::Plain(tcp) => Pin::new(tcp).poll_write_vectored(context, parts),
            Stream::Secured(tls) => Pin::new(tls).poll_write_vectored(context, parts),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Stream::Plain(tcp) => tcp.is_write_vectored(),
            Stream::Secured(tls) => tls.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain(tcp) => Pin::new(tcp).poll_flush(context),
            Stream::Secured(tls) => Pin::new(tls).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain(tcp) => Pin::new(tcp).poll_shutdown(context),
            Stream::Secured(tls) => Pin::new(tls).poll_shutdown(context),
        }
    }
}
