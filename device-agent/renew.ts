import type { BodyOf } from '@fleetkey/protocol/messages.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { tlsBinding } from '@fleetkey/protocol/transcript.ts'
import { parseCertificate } from '@fleetkey/protocol/x509/certificate.ts'
import { checkTls } from './enrol.ts'
import type { Identity, PendingRenewal, Store } from './identity.ts'
import { newTlsKey, tlsCsr } from './tls-key.ts'
import type { Trust } from './trust.ts'

/**
 * The request for the next TLS certificate, over this connection's session nonce. The new key and the request id are durable before it leaves: when
 * the answer is lost, the same request is repeated and gets the same certificate.
 */
export const prepareRenewal = async (of: {
  readonly store: Store<PendingRenewal | null>
  readonly identity: Identity
  readonly tenant: string
  readonly session: Uint8Array
  readonly sign: (data: Uint8Array) => Promise<Uint8Array>
  readonly random: (length: number) => Uint8Array
  readonly now: number
  readonly step: (name: string) => void
}): Promise<{ readonly pending: PendingRenewal; readonly body: BodyOf<'renew'> }> => {
  const known = await of.store.load()
  // The server gives the same answer for as long as it is good, and says `conflict` when it is over.
  const usable = known !== undefined && known !== null
  const pending: PendingRenewal = usable ? known : { id: of.random(16), tlsKey: newTlsKey(), since: of.now }
  if (!usable) {
    await of.store.save(pending)
    // A crash here: a key that nobody knows; the next attempt asks for its certificate.
    of.step('renew.prepared')
  }
  const body: BodyOf<'renew'> = {
    type: 'renew',
    session: of.session,
    csr: await tlsCsr(pending.tlsKey, of.identity.device),
    binding: await of.sign(tlsBinding(of.tenant, of.session, pending.tlsKey.spki)),
  }
  return { pending, body }
}

/** The identity with the new TLS certificate. Throws Problem when the message is not for this device, key and root. */
export const renewedIdentity = (of: {
  readonly identity: Identity
  readonly pending: PendingRenewal
  readonly message: BodyOf<'identity'>
  readonly trust: Trust
}): Identity => {
  const { identity, pending, message } = of
  checkTls(of.trust, { ...message, device: identity.device as typeof message.device }, pending.tlsKey, message.time)
  const ldevid = message.ldevid ?? identity.ldevid
  const { spki } = of.trust.check(ldevid, message.chain, message.time)
  // The LDevID key stays; a new certificate for it comes from a new CA.
  if (Buffer.compare(spki, parseCertificate(identity.ldevid).spki) !== 0)
    throw new Problem('forbidden', 'an LDevID certificate for another key', { reason: 'identity.ldevid-key' })
  return { ...identity, ldevid, tls: message.tls, tlsKey: pending.tlsKey, chain: message.chain, keys: message.keys }
}
