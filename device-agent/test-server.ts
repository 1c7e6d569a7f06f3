import { createPublicKey, generateKeyPairSync, randomBytes, sign, type KeyObject } from 'node:crypto'
import { DeviceId, EnrolmentId, TenantId } from '@fleetkey/protocol/ids.ts'
import type { Body } from '@fleetkey/protocol/messages.ts'
import { keyId, signMessage } from '@fleetkey/protocol/signed.ts'
import { testCertificate, type Order } from './test-certificates.ts'
import { openTrust, type Trust } from './trust.ts'

export const hour = 3_600_000
export const day = 24 * hour
/** When the tests play, milliseconds since 1970. */
export const today = Date.UTC(2026, 5, 1)

export interface KeyPair {
  readonly private: KeyObject
  readonly spki: Uint8Array
  readonly sign: (data: Uint8Array) => Promise<Uint8Array>
}
export const keyPair = (): KeyPair => {
  const { privateKey } = generateKeyPairSync('ec', { namedCurve: 'prime256v1' })
  return {
    private: privateKey,
    spki: new Uint8Array(createPublicKey(privateKey).export({ format: 'der', type: 'spki' })),
    sign: async (data) => new Uint8Array(sign('sha256', data, { key: privateKey, dsaEncoding: 'ieee-p1363' })),
  }
}

/** For tests: the keys and certificates of one server, without the server. `start`: the day they are meant for. */
export const testServer = (of: { readonly role?: Partial<Order>; readonly start?: number } = {}) => {
  const [root, issuing, challenge, delivery] = [keyPair(), keyPair(), keyPair(), keyPair()]
  const start = of.start ?? today
  const life = { notBefore: start - 30 * day, notAfter: start + 365 * day }
  const rootDer = testCertificate({ subject: 'root', spki: root.spki, issuer: 'root', key: root.private, ca: 1, ...life })
  const issuingDer = testCertificate({ subject: 'issuing', spki: issuing.spki, issuer: 'root', key: root.private, ca: 0, ...life })
  const issue = (order: Pick<Order, 'subject' | 'spki'> & Partial<Order>): Uint8Array =>
    testCertificate({ issuer: 'issuing', key: issuing.private, ca: null, ...life, ...order })
  const roles = { challenge, delivery }
  const certificates = {
    challenge: issue({ subject: 'challenge-signing', spki: challenge.spki, role: 'challenge', ...of.role }),
    delivery: issue({ subject: 'delivery-signing', spki: delivery.spki, role: 'delivery', ...of.role }),
  }
  const source = { trust: [rootDer], chain: [issuingDer], keys: [certificates.challenge, certificates.delivery] }
  let sequence = 0
  return {
    source,
    certificates,
    issuing: { der: issuingDer, key: issuing.private },
    root: { der: rootDer, key: root.private },
    issue,
    trust: (): Trust => openTrust(source),
    /** A message as the server sends it; `as` another key, `from` the other side. */
    async message(
      to: string,
      body: Body,
      how: { readonly role?: keyof typeof roles; readonly as?: KeyPair; readonly tenant?: string; readonly from?: 'device' | 'server' } = {},
    ): Promise<Uint8Array> {
      const signer = how.as ?? roles[how.role ?? 'delivery']
      const device = to.startsWith('e-') ? EnrolmentId.parse(to) : DeviceId.parse(to)
      const envelope = {
        v: 1,
        tenant: TenantId.parse(how.tenant ?? 'plant'),
        device,
        from: how.from ?? 'server',
        id: new Uint8Array(randomBytes(16)),
        seq: (sequence += 1),
        body,
      } as const
      return await signMessage(envelope, { kid: keyId(signer.spki), sign: signer.sign })
    },
  }
}
export type TestServer = ReturnType<typeof testServer>
