//! Credentials that change while the agent runs, and the ways to a server.

use super::*;
use rcgen::{CertifiedKey, KeyPair, generate_simple_self_signed};
use rustls::crypto::ring::default_provider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;

/// A folder of its own, removed with the test.
struct Folder(PathBuf);

impl Folder {
    fn new(test: &str) -> Self {
        let path = std::env::temp_dir().join(format!("portolan-{test}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        fs::write(self.0.join(name), text).unwrap();
        self.0.join(name)
    }

    /// Files are named without their folder.
    fn kubeconfig(&self, cluster: &Value, user: &Value) -> PathBuf {
        let text = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "it",
            "clusters": [{ "name": "it", "cluster": cluster }],
            "users": [{ "name": "it", "user": user }],
            "contexts": [{ "name": "it", "context": { "cluster": "it", "user": "it" } }],
        });
        self.write("kubeconfig", &text.to_string())
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

type Identity = CertifiedKey<KeyPair>;

fn identity() -> Identity {
    generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap()
}

/// An API server with TLS that knows one client by its certificate.
#[derive(Clone)]
struct Tls {
    own: Arc<Mutex<Identity>>,
    client: Arc<Mutex<CertificateDer<'static>>>,
}

impl Tls {
    /// `clients` are all that there will be.
    async fn serve(self, listener: TcpListener, script: Script, clients: Vec<CertificateDer<'static>>) {
        let mut roots = RootCertStore::empty();
        clients.into_iter().for_each(|client| roots.add(client).unwrap());
        let provider = Arc::new(default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider.clone());
        let verifier = verifier.allow_unauthenticated().build().unwrap();
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let (chain, key) = {
                let own = self.own.lock().unwrap();
                (own.cert.der().clone(), PrivateKeyDer::try_from(own.signing_key.serialize_der()).unwrap())
            };
            let config = ServerConfig::builder_with_provider(provider.clone())
                .with_safe_default_protocol_versions()
                .unwrap()
                .with_client_cert_verifier(verifier.clone())
                .with_single_cert(vec![chain], key)
                .unwrap();
            let (script, client) = (script.clone(), self.client.clone());
            tokio::spawn(async move {
                let Ok(stream) = TlsAcceptor::from(Arc::new(config)).accept(stream).await else { return };
                let shown = stream.get_ref().1.peer_certificates().map(|chain| chain[0].clone().into_owned());
                script
                    .connection(stream, move |_: &str| shown.as_ref() == Some(&client.lock().unwrap()))
                    .await;
            });
        }
    }
}

async fn listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// Waits for a change; after failures the agent asks ever more slowly, and may list anew.
async fn comes(source: &mut Source, wanted: &str) {
    let comes = async {
        loop {
            let change = source.changes.recv().await.unwrap();
            if let Change::Applied(object) = change
                && format!("+{}", object.reference().name) == wanted
            {
                return;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(90), comes).await.unwrap_or_else(|_| panic!("no {wanted}"));
}

#[tokio::test]
async fn a_client_certificate_and_an_authority_that_are_replaced_are_taken_up() {
    let folder = Folder::new("rotation");
    let (first, second, other_server) = (identity(), identity(), identity());
    let tls =
        Tls { own: Arc::new(Mutex::new(identity())), client: Arc::new(Mutex::new(first.cert.der().clone())) };
    folder.write("ca.crt", &tls.own.lock().unwrap().cert.pem());
    folder.write("client.crt", &first.cert.pem());
    folder.write("client.key", &first.signing_key.serialize_pem());
    let (listener, address) = listener().await;
    let script = Script::default();
    let clients = vec![first.cert.der().clone(), second.cert.der().clone()];
    tokio::spawn(tls.clone().serve(listener, script.clone(), clients));
    let kubeconfig = folder.kubeconfig(
        &json!({ "server": format!("https://{address}"), "certificate-authority": "ca.crt" }),
        &json!({ "client-certificate": "client.crt", "client-key": "client.key" }),
    );
    script
        .then("list services", list(&[service("a", "5")], "7"))
        .then("watch services", Answer::LinesThenEnd(vec![event("ADDED", &service("b", "8"))]));
    let mut source = Source::of_kubeconfig(&kubeconfig).await;
    assert_eq!(source.next(Kind::Service).await, "=d/a");

    // The server knows another certificate now, and the files are replaced only after it has refused the old one.
    *tls.client.lock().unwrap() = second.cert.der().clone();
    script.then("watch services", Answer::LinesThenEnd(vec![event("ADDED", &service("c", "9"))]));
    while source.watch.status().of(Kind::Service).error.is_none() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let error = source.watch.status().of(Kind::Service).error.unwrap_or_default();
    assert!(error.contains("(401): check the token or client certificate"), "{error}");
    folder.write("client.key", "half written");
    tokio::time::sleep(Duration::from_millis(1500)).await;
    folder.write("client.crt", &second.cert.pem());
    folder.write("client.key", &second.signing_key.serialize_pem());
    comes(&mut source, "+d/c").await;

    // The server's own certificate is of another authority from now on.
    *tls.own.lock().unwrap() =
        CertifiedKey { cert: other_server.cert, signing_key: other_server.signing_key };
    folder.write("ca.crt", &tls.own.lock().unwrap().cert.pem());
    script.then("watch services", Answer::LinesThenEnd(vec![event("ADDED", &service("d", "10"))]));
    comes(&mut source, "+d/d").await;
}

#[tokio::test]
async fn a_token_that_is_revoked_is_replaced_by_that_of_the_changed_kubeconfig() {
    let folder = Folder::new("revoked");
    let (listener, address) = listener().await;
    let (script, token) = (Script::default(), Arc::new(Mutex::new("old")));
    {
        let (script, token) = (script.clone(), token.clone());
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let token = token.clone();
                let knows = move |head: &str| head.contains(&format!("Bearer {}\r\n", token.lock().unwrap()));
                tokio::spawn(script.clone().connection(stream, knows));
            }
        });
    }
    let cluster = json!({ "server": format!("http://{address}") });
    let kubeconfig = folder.kubeconfig(&cluster, &json!({ "token": "old" }));
    script
        .then("list services", list(&[], "7"))
        .then("watch services", Answer::LinesThenEnd(vec![event("ADDED", &service("a", "8"))]));
    let mut source = Source::of_kubeconfig(&kubeconfig).await;
    assert_eq!([source.next(Kind::Service).await, source.next(Kind::Service).await], ["=", "+d/a"]);
    *token.lock().unwrap() = "new";
    while source.watch.status().of(Kind::Service).error.is_none() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    script.then("watch services", Answer::Lines(vec![event("ADDED", &service("b", "9"))]));
    folder.kubeconfig(&cluster, &json!({ "token": "new" }));
    comes(&mut source, "+d/b").await;
    assert_eq!(source.watch.status().trouble(), None);
}

/// A proxy that makes tunnels, and counts them.
async fn tunnels(listener: TcpListener, made: Arc<Mutex<Vec<String>>>) {
    loop {
        let (client, _) = listener.accept().await.unwrap();
        let made = made.clone();
        tokio::spawn(async move {
            let mut client = BufReader::new(client);
            let (mut head, mut line) = (String::new(), String::new());
            while client.read_line(&mut line).await.unwrap() > 2 {
                head.push_str(&line);
                line.clear();
            }
            let target = head.split(' ').nth(1).unwrap().to_owned();
            made.lock().unwrap().push(head);
            let mut server = TcpStream::connect(target).await.unwrap();
            client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
            let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
        });
    }
}

#[tokio::test]
async fn a_proxy_of_the_kubeconfig_is_gone_through_and_named() {
    let folder = Folder::new("proxy");
    let ((server, address), (proxy, by)) = (listener().await, listener().await);
    let (script, made) = (Script::default(), Arc::new(Mutex::new(Vec::new())));
    tokio::spawn(script.clone().serve(server));
    tokio::spawn(tunnels(proxy, made.clone()));
    let cluster = |by: SocketAddr| json!({ "server": format!("http://{address}"), "proxy-url": format!("http://me:secret@{by}") });
    let kubeconfig = folder.kubeconfig(&cluster(by), &json!({}));
    script.then("list services", list(&[service("a", "5")], "7"));
    let mut source = Source::of_kubeconfig(&kubeconfig).await;
    assert_eq!(source.next(Kind::Service).await, "=d/a");
    let heads = made.lock().unwrap().join("");
    assert!(heads.starts_with(&format!("CONNECT {address} ")), "{heads}");
    assert!(heads.to_ascii_lowercase().contains("proxy-authorization: basic "), "{heads}");
    assert!(script.headers.lock().unwrap().to_ascii_lowercase().contains("accept-encoding: "));

    let nobody = SocketAddr::from(([127, 0, 0, 1], 1));
    let source = Source::of_kubeconfig(&folder.kubeconfig(&cluster(nobody), &json!({}))).await;
    let error = loop {
        if let Some(error) = source.watch.status().of(Kind::Service).error {
            break error;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    assert!(error.contains(&format!("{address}/ by the proxy http://{nobody} of proxy-url")), "{error}");
    assert!(error.contains("check the proxy") && !error.contains("secret"), "{error}");
}
