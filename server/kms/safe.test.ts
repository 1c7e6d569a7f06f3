import { createECDH } from 'node:crypto'
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest'
import { encode } from '@fleetkey/protocol/cbor.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'
import { openSealedShare, parseShare, sealShare, shareText, type Share } from '@fleetkey/protocol/share.ts'
import { openSafe, type Safe } from './safe.ts'
import { openKms } from './open.ts'
import type { FileBackend } from './orders.ts'
import { readHeader, writeHeader } from './slots.ts'

let place: string
let folder: string
const opened: Safe[] = []
beforeEach(() => {
  place = mkdtempSync(join(tmpdir(), 'fk-seal-'))
  folder = join(place, 'kms')
})
afterEach(async () => {
  vi.useRealTimers()
  for (const one of opened.splice(0)) await one.close()
  rmSync(place, { recursive: true, force: true })
})

const passphraseFile = (): string => join(place, 'passphrase')
const withPassphrase = (text = 'correct horse battery'): FileBackend => {
  writeFileSync(passphraseFile(), text, { mode: 0o600 })
  return { kind: 'file', passphraseFile: passphraseFile(), keyFile: null }
}
const keyFile: FileBackend = { kind: 'file', passphraseFile: null, keyFile: null }
const open = async (backend: FileBackend, of = folder): Promise<Safe> => {
  const safe = await openSafe({
    folder: of,
    open: async (master) => await openKms({ folder: of, master }, backend),
    step: () => undefined,
    onOpen: () => undefined,
  })
  opened.push(safe)
  return safe
}
const closed = async (safe: Safe): Promise<void> => {
  await safe.close()
  opened.splice(opened.indexOf(safe), 1)
}

const split = async (safe: Safe, shares: number, threshold: number, only = false): Promise<readonly Share[]> => {
  const mine = createECDH('prime256v1')
  mine.generateKeys()
  const made = await safe.split({ shares, threshold, only }, new Uint8Array(mine.getPublicKey()))
  return made.shares.map((one) => openSealedShare(mine, 'out', one))
}
const handIn = async (safe: Safe, share: Share | undefined, reset = false) => {
  if (share === undefined) throw new Error('no such share')
  return (await safe.unseal(sealShare((await safe.status()).recipient, 'in', share), reset)).status
}
/** The same share with another value. */
const forged = ({ set, index, value }: Share, to = index): Share => ({ set, index: to, value: new Secret(value.bytes().map((byte) => byte ^ 1)) })

/** A store with a key, split; closed, and what opened it taken away. */
const sealedStore = async (
  shares: number,
  threshold: number,
): Promise<{ readonly safe: Safe; readonly parts: readonly Share[]; readonly spki: Uint8Array | null }> => {
  const first = await open(withPassphrase())
  const { spki } = await first.kms().create('a', 'audit-signing')
  const parts = await split(first, shares, threshold)
  await first.confirm(parts[0]?.set ?? '')
  await closed(first)
  rmSync(passphraseFile())
  return { safe: await open({ kind: 'file', passphraseFile: passphraseFile(), keyFile: null }), parts, spki }
}

describe('shares', () => {
  test.each([
    [2, 2],
    [3, 2],
    [5, 3],
    [64, 64],
  ])('%i shares, %i of them open the keys, the last ones as well as the first, in any order', async (shares, threshold) => {
    const { safe, parts, spki } = await sealedStore(shares, threshold)
    expect(() => safe.kms()).toThrow(/passphrase file .* is missing/)
    const chosen = parts.toReversed().slice(0, threshold)
    for (const [at, share] of chosen.entries()) {
      const { sealed, sets } = await handIn(safe, share)
      expect(sealed).toBe(at < threshold - 1)
      expect(sets).toMatchObject([
        {
          shares,
          threshold,
          gathered: sealed
            ? chosen
                .slice(0, at + 1)
                .map(({ index }) => index)
                .toSorted((a, b) => a - b)
            : [],
        },
      ])
    }
    expect((await safe.kms().describe('a'))?.spki).toEqual(spki)
    await expect(handIn(safe, parts[0])).rejects.toMatchObject({ code: 'conflict', reason: 'seal.open' })
  })

  test('a wrong one is told, counted and spoils nothing: another value, another number, another set, one handed in twice', async () => {
    const { safe, parts, spki } = await sealedStore(5, 3)
    const [one, two, three] = parts
    if (one === undefined || two === undefined) throw new Error('too few')
    await handIn(safe, one)
    await handIn(safe, one)
    await expect(handIn(safe, forged(two))).rejects.toMatchObject({ code: 'forbidden', reason: 'seal.share.wrong' })
    await expect(handIn(safe, { ...two, index: 3 })).rejects.toMatchObject({ code: 'forbidden', reason: 'seal.share.wrong' })
    await expect(handIn(safe, { ...two, index: 6 })).rejects.toMatchObject({ code: 'forbidden', reason: 'seal.share.wrong' })
    await expect(handIn(safe, { ...two, set: '0123456789abcdef' })).rejects.toMatchObject({
      code: 'forbidden',
      reason: 'seal.share.set',
      message: `share 2 is of set 0123456789abcdef, which opens nothing here: these keys are split as set ${two.set} (3 of 5)`,
    })
    const text = Buffer.from('fleetkey')
    await expect(safe.unseal(text, false)).rejects.toMatchObject({ code: 'malformed', reason: 'seal.recipient' })
    expect(await safe.status()).toMatchObject({ sealed: true, wrong: 4, sets: [{ gathered: [1] }] })
    await closed(safe)
    // The count outlives the process, what was gathered does not.
    const again = await open({ kind: 'file', passphraseFile: passphraseFile(), keyFile: null })
    expect(await again.status()).toMatchObject({ wrong: 4, sets: [{ gathered: [] }] })
    for (const share of [one, two, three]) await handIn(again, share)
    expect(await again.status()).toMatchObject({ sealed: false, wrong: 0 })
    expect((await again.kms().describe('a'))?.spki).toEqual(spki)
  })

  test('gathered ones are forgotten: when a share is handed in with that wish, and a quarter of an hour after the last', async () => {
    const { safe, parts } = await sealedStore(3, 3)
    const gathered = async () => (await safe.status()).sets[0]?.gathered
    await handIn(safe, parts[0])
    await handIn(safe, parts[1])
    // Only who has a share may ask for it.
    await expect(handIn(safe, forged(parts[2] as Share), true)).rejects.toMatchObject({ reason: 'seal.share.wrong' })
    expect(await gathered()).toEqual([1, 2])
    await handIn(safe, parts[2], true)
    expect(await gathered()).toEqual([3])
    vi.useFakeTimers({ toFake: ['setTimeout', 'clearTimeout'] })
    await handIn(safe, parts[0])
    vi.advanceTimersByTime(14 * 60_000)
    expect(await gathered()).toEqual([1, 3])
    vi.advanceTimersByTime(61_000)
    expect(await gathered()).toEqual([])
  })

  test('a new set takes the place of the old one when it is confirmed, not before; until then either opens, never a mixture', async () => {
    const first = await open(withPassphrase())
    const old = await split(first, 3, 2)
    await first.confirm(old[0]?.set ?? '')
    const lost = await split(first, 3, 2)
    const fresh = await split(first, 4, 3)
    expect((await first.status()).sets.map(({ set, confirmed }) => [set, confirmed])).toEqual([
      [old[0]?.set, true],
      [fresh[0]?.set, false],
    ])
    await closed(first)
    rmSync(passphraseFile())
    const missing: FileBackend = { kind: 'file', passphraseFile: passphraseFile(), keyFile: null }
    const second = await open(missing)
    await expect(handIn(second, lost[0])).rejects.toMatchObject({ reason: 'seal.share.set' })
    await handIn(second, old[0])
    await handIn(second, fresh[1])
    expect(await second.status()).toMatchObject({ sealed: true, sets: [{ gathered: [1] }, { gathered: [2] }] })
    await handIn(second, old[2])
    expect(await second.status()).toMatchObject({ sealed: false })
    await second.confirm(fresh[0]?.set ?? '')
    await second.confirm(fresh[0]?.set ?? '')
    await expect(second.confirm(old[0]?.set ?? '')).rejects.toMatchObject({ code: 'not-found' })
    await closed(second)
    const third = await open(missing)
    await expect(handIn(third, old[0])).rejects.toMatchObject({ reason: 'seal.share.set' })
    for (const share of fresh.slice(1)) await handIn(third, share)
    expect(await third.status()).toMatchObject({ sealed: false })
  })

  test('alone: once confirmed neither the key file nor a copy of it opens the keys', async () => {
    const first = await open(keyFile)
    const { spki } = await first.kms().create('a', 'audit-signing')
    const copy = readFileSync(join(folder, 'master.key'))
    const parts = await split(first, 3, 2, true)
    expect(existsSync(join(folder, 'master.key'))).toBe(true)
    expect(await first.confirm(parts[0]?.set ?? '')).toMatchObject({ ways: [], sets: [{ only: true, confirmed: true }] })
    expect(existsSync(join(folder, 'master.key'))).toBe(false)
    await closed(first)
    writeFileSync(join(folder, 'master.key'), copy, { mode: 0o600 })
    const second = await open(keyFile)
    expect(await second.status()).toMatchObject({ sealed: true, reason: 'nothing but shares opens these keys' })
    await handIn(second, parts[2])
    await handIn(second, parts[0])
    expect((await second.kms().describe('a'))?.spki).toEqual(spki)
    // What a crash may have kept from being removed.
    expect(existsSync(join(folder, 'master.key'))).toBe(false)
  })

  test('what was never split, or is open, takes none; what is sealed is not split', async () => {
    const first = await open(withPassphrase())
    await closed(first)
    rmSync(passphraseFile())
    const safe = await open({ kind: 'file', passphraseFile: passphraseFile(), keyFile: null })
    const share: Share = { set: '0123456789abcdef', index: 1, value: new Secret(new Uint8Array(33)) }
    await expect(handIn(safe, share)).rejects.toMatchObject({ code: 'conflict', reason: 'seal.no-shares' })
    await expect(split(safe, 3, 2)).rejects.toMatchObject({ code: 'unavailable', reason: 'kms.sealed' })
  })

  test('a header put together from two, or changed, opens nothing', async () => {
    const { safe, parts } = await sealedStore(3, 2)
    await closed(safe)
    const header = readHeader(folder)
    const other = join(place, 'other')
    const foreign = await open(withPassphrase(), other)
    await closed(foreign)
    rmSync(passphraseFile())
    if (header === undefined) throw new Error('no header')
    const missing: FileBackend = { kind: 'file', passphraseFile: passphraseFile(), keyFile: null }
    writeHeader(folder, { check: readHeader(other)?.check ?? new Uint8Array(), slots: header.slots })
    const mixed = await open(missing)
    await handIn(mixed, parts[0])
    await expect(handIn(mixed, parts[1])).rejects.toMatchObject({ code: 'internal', reason: 'kms.tampered' })
    expect(await mixed.status()).toMatchObject({ sealed: true })
    await closed(mixed)
    writeHeader(folder, { check: header.check, slots: header.slots.map((slot) => (slot.kind === 'shares' ? { ...slot, threshold: 4 } : slot)) })
    await expect(open(missing)).rejects.toMatchObject({ code: 'internal', reason: 'kms.tampered' })
  })
})

test('sealed by a missing passphrase it opens when the file is there, and stays sealed under a wrong one', { timeout: 20_000 }, async () => {
  const first = await open(withPassphrase())
  await first.kms().create('a', 'kek')
  await closed(first)
  rmSync(passphraseFile())
  const safe = await open({ kind: 'file', passphraseFile: passphraseFile(), keyFile: null })
  expect(await safe.status()).toMatchObject({ sealed: true, ways: ['passphrase'], sets: [] })
  withPassphrase('correct horse batterz')
  await vi.waitFor(async () => expect(await safe.status()).toMatchObject({ sealed: true, reason: 'wrong passphrase for this KMS' }), 10_000)
  await closed(safe)
  rmSync(passphraseFile())
  const again = await open({ kind: 'file', passphraseFile: passphraseFile(), keyFile: null })
  withPassphrase()
  await vi.waitFor(async () => expect(await again.status()).toMatchObject({ sealed: false, reason: null }), 10_000)
  expect((await again.kms().list()).map(({ name }) => name)).toEqual(['a'])
})

describe.each(['key file', 'passphrase'] as const)('a folder from before there were slots: %s', (kind) => {
  test('opens as it is, is split, and opens by either way; a wrong one is told', async () => {
    const vectors = JSON.parse(readFileSync(new URL('../../test/vectors/kms-1.json', import.meta.url), 'utf8')) as Record<string, Record<string, string>>
    mkdirSync(folder)
    for (const [name, content] of Object.entries(vectors[kind] ?? {})) writeFileSync(join(folder, name), Buffer.from(content, 'hex'), { mode: 0o600 })
    const before = readFileSync(join(folder, 'kms.cbor'))
    const backend = kind === 'key file' ? keyFile : withPassphrase()
    const safe = await open(backend)
    const names = (await safe.kms().list()).map(({ name }) => name)
    expect(names).toEqual(['audit-signing', 'kek'])
    expect(readFileSync(join(folder, 'kms.cbor'))).toEqual(before)
    const parts = await split(safe, 2, 2)
    await closed(safe)
    const [way, file] = kind === 'key file' ? ['file', join(folder, 'master.key')] : ['passphrase', passphraseFile()]
    const right = readFileSync(file)
    const again = await open(backend)
    expect((await again.kms().list()).map(({ name }) => name)).toEqual(names)
    await closed(again)
    writeFileSync(
      file,
      right.map((byte) => byte ^ 1),
    )
    await expect(open(backend)).rejects.toMatchObject({ code: 'unauthenticated' })
    rmSync(file)
    const byShares = await open(backend)
    expect(await byShares.status()).toMatchObject({ sealed: true, ways: [way] })
    for (const share of parts) await handIn(byShares, share)
    expect((await byShares.kms().list()).map(({ name }) => name)).toEqual(names)
  })
})

test('a share as text: what does not count is forgiven, a wrong letter is not', () => {
  const share: Share = { set: 'a1b2c3d4e5f60718', index: 12, value: new Secret(Uint8Array.from({ length: 33 }, (_, at) => at * 7)) }
  const text = shareText(share)
  const read = parseShare(`  ${text.slice(0, 30)}\n ${text.slice(30).toUpperCase()}\r\n`)
  expect([read.set, read.index, read.value.equals(share.value)]).toEqual([share.set, 12, true])
  for (let at = 17; at < text.length; at++) {
    if (text[at] === '.') continue
    const wrong = `${text.slice(0, at)}${text[at] === '1' ? '2' : '1'}${text.slice(at + 1)}`
    expect(() => parseShare(wrong), wrong).toThrow(/does not fit its checksum|is no share/)
  }
  for (const none of ['', 'fleetkey', text.slice(0, -1), `${text}0`, text.replace('.12.', '.0.'), text.replace('.12.', '.65.')])
    expect(() => parseShare(none)).toThrow(/this is no share/)
})

test('what is not a count is none', async () => {
  const first = await open(withPassphrase())
  await closed(first)
  for (const content of [encode({ format: 'fleetkey/unseal/1', wrong: -1 }), encode('x'), Uint8Array.of(0xff)]) {
    writeFileSync(join(folder, 'unseal.cbor'), content)
    const safe = await open(withPassphrase())
    expect(await safe.status()).toMatchObject({ wrong: 0 })
    await closed(safe)
  }
})
