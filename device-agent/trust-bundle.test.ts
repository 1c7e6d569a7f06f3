import { generateKeyPairSync, sign, type KeyObject } from 'node:crypto'
import { beforeEach, describe, expect, test } from 'vitest'
import { DeviceId, TenantId } from '@fleetkey/protocol/ids.ts'
import type { TrustBundle } from '@fleetkey/protocol/messages.ts'
import { toProblem } from '@fleetkey/protocol/problem.ts'
import { keyId, signMessage } from '@fleetkey/protocol/signed.ts'
import { sha256 } from '@fleetkey/protocol/transcript.ts'
import type { Role } from '@fleetkey/protocol/x509/roles.ts'
import { openDocument } from './files.ts'
import { memoryFileSystem } from './memory-filesystem.ts'
import { testCertificate } from './test-certificates.ts'
import { openTrust, readFromServer, type Trust } from './trust.ts'
import { signedAt } from './test-clock.ts'
import { judgeBundle, sourceOf, trustStore } from './trust-bundle.ts'

const now = Date.UTC(2027, 0, 1)
const year = 365 * 86_400_000

interface Key {
  readonly spki: Uint8Array
  readonly key: KeyObject
}
const newKey = (): Key => {
  const { privateKey, publicKey } = generateKeyPairSync('ec', { namedCurve: 'prime256v1' })
  return { spki: Uint8Array.from(publicKey.export({ format: 'der', type: 'spki' })), key: privateKey }
}
const certified = (subject: string, of: Key, by: { name: string; key: Key }, more: { ca?: number; role?: Role } = {}): Uint8Array =>
  testCertificate({
    subject,
    spki: of.spki,
    issuer: by.name,
    key: by.key.key,
    ca: more.ca ?? null,
    notBefore: now - year,
    notAfter: now + year,
    ...(more.role === undefined ? {} : { role: more.role }),
  })

// Two generations, each with a root of its own; both roots have one name.
const hash = (of: Key): Uint8Array => Uint8Array.from(sha256(of.spki))
const [root1, root2, issuing1, issuing2, delivery] = [newKey(), newKey(), newKey(), newKey(), newKey()]
const byRoot = (key: Key) => ({ name: 'root', key })
const certificates = {
  root1: certified('root', root1, byRoot(root1), { ca: 1 }),
  root2: certified('root', root2, byRoot(root2), { ca: 1 }),
  cross: certified('root', root2, byRoot(root1), { ca: 1 }),
  issuing1: certified('issuing', issuing1, byRoot(root1), { ca: 0 }),
  issuing2: certified('issuing 2', issuing2, byRoot(root2), { ca: 0 }),
  delivery1: certified('delivery', delivery, { name: 'issuing', key: issuing1 }, { role: 'delivery' }),
  delivery2: certified('delivery', delivery, { name: 'issuing 2', key: issuing2 }, { role: 'delivery' }),
}
const configured = (): Trust => openTrust({ trust: [certificates.root1], chain: [certificates.issuing1], keys: [certificates.delivery1] })

const both: TrustBundle = {
  type: 'trust',
  version: 2,
  roots: [certificates.root2, certificates.root1],
  chain: [certificates.issuing2, certificates.issuing1, certificates.cross],
  keys: [certificates.delivery1],
  tainted: [],
  retired: [],
  renewWithin: 60,
}
const tainted: TrustBundle = { ...both, version: 4, keys: [certificates.delivery2], tainted: [hash(issuing1), hash(root1)] }
const retired: TrustBundle = {
  ...tainted,
  version: 5,
  roots: [certificates.root2],
  chain: [certificates.issuing2, certificates.cross],
  tainted: [],
  retired: [hash(issuing1), hash(root1)],
}

const judged = (bundle: TrustBundle, trust: Trust, held?: TrustBundle): string => {
  try {
    return judgeBundle(bundle, { held, trust, kid: keyId(delivery.spki), time: signedAt(now) }) === undefined ? 'held' : 'taken'
  } catch (thrown) {
    return toProblem(thrown).reason ?? 'internal'
  }
}

describe('a trust bundle', () => {
  const own = newKey()
  const ownRoot = certified('root', own, byRoot(own), { ca: 1 })
  const held = (bundle: TrustBundle): Trust => openTrust(sourceOf(bundle))
  const cases: readonly (readonly [string, () => string, string])[] = [
    ['the next root, certified by the one of the configuration', () => judged(both, configured()), 'taken'],
    ['straight from the configuration to a bundle without its root', () => judged(retired, configured()), 'taken'],
    ['the one that is held', () => judged(both, held(both), both), 'held'],
    ['an older one, replayed', () => judged(both, held(tainted), tainted), 'trust.older'],
    ['another one under the same version', () => judged({ ...both, renewWithin: 1 }, held(both), both), 'trust.other-content'],
    ['a root of the message key’s own making', () => judged({ ...both, roots: [ownRoot, ...both.roots] }, configured()), 'trust.root'],
    ['the next root without what certifies it', () => judged({ ...both, chain: [certificates.issuing1, certificates.issuing2] }, configured()), 'trust.root'],
    ['one that would not believe its sender', () => judged({ ...both, keys: [certificates.issuing1] }, configured()), 'trust.sender'],
    ['one that calls its own sender’s CA retired', () => judged({ ...both, retired: [hash(issuing1)] }, configured()), 'trust.sender'],
  ]
  test.each(cases)('%s: %#', (_name, run, want) => expect(run()).toBe(want))
})

describe('messages after a CA was left', () => {
  const read = async (bundle: TrustBundle, trust: Trust): Promise<string> => {
    const envelope = {
      v: 1,
      tenant: TenantId.parse('plant'),
      device: DeviceId.parse('gw-1'),
      from: 'server',
      id: new Uint8Array(16),
      seq: 1,
      body: bundle,
    } as const
    const bytes = await signMessage(envelope, {
      kid: keyId(mallory.spki),
      sign: async (tbs) => new Uint8Array(sign('sha256', tbs, { key: mallory.key, dsaEncoding: 'ieee-p1363' })),
    })
    try {
      readFromServer(bytes, { trust, tenant: 'plant', client: 'gw-1', time: signedAt(now), max: 64 << 10 })
      return 'accepted'
    } catch (thrown) {
      return toProblem(thrown).reason ?? 'internal'
    }
  }
  // Whoever has the key of the old CA makes a message key of their own.
  const mallory = newKey()
  const forged = certified('delivery', mallory, { name: 'issuing', key: issuing1 }, { role: 'delivery' })
  const knowing = (bundle: TrustBundle): Trust => openTrust(sourceOf(bundle)).with({ chain: [certificates.issuing1], keys: [forged] })

  test('signed under the old CA while it counts: accepted', async () => expect(await read(both, knowing(both))).toBe('accepted'))
  test('tainted: refused', async () => expect(await read({ ...both, version: 9 }, knowing(tainted))).toBe('server.signer'))
  test('retired: refused', async () => expect(await read({ ...both, version: 9 }, knowing(retired))).toBe('server.signer'))

  test('what a tainted CA has issued to devices still leads to the root, of a retired one no more', () => {
    const leaf = certified('gw-1', newKey(), { name: 'issuing', key: issuing1 })
    expect(knowing(tainted).check(leaf, [certificates.issuing1], now).commonName).toBe('gw-1')
    expect(() => knowing(retired).check(leaf, [certificates.issuing1, certificates.root1], now)).toThrow('does not lead to our root')
    // Other ways up count, whatever was sent along.
    const fresh = certified('server', newKey(), { name: 'issuing 2', key: issuing2 })
    expect(knowing(retired).check(fresh, [certificates.issuing1, certificates.issuing2, certificates.cross], now).commonName).toBe('server')
  })
})

describe('at rest', () => {
  let files: ReturnType<typeof memoryFileSystem>
  beforeEach(() => void (files = memoryFileSystem()))
  const open = (onLoss: (why: string) => void = () => undefined) =>
    trustStore(openDocument({ files, folder: '/data', name: 'trust', step: () => undefined }), onLoss)

  test('comes back, byte for byte; the older version is nowhere any more', async () => {
    await open().save(both)
    await open().save(tainted)
    expect(await open().load()).toEqual(tainted)
    for (const slot of ['/data/trust.a', '/data/trust.b']) {
      const bytes = Buffer.from((await files.read(slot)) ?? new Uint8Array())
      expect(bytes.includes(Buffer.from(certificates.delivery1))).toBe(false)
    }
  })
  test('nothing stored: nothing', async () => expect(await open().load()).toBeUndefined())
})
