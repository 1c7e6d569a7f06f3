import { createPublicKey, verify } from 'node:crypto'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { Secret } from '@fleetkey/protocol/secret.ts'
import type { Kms } from '@fleetkey/server/flows/context.ts'

const bytes = (text: string): Uint8Array => new Uint8Array(Buffer.from(text))

/** What every back end of the KMS must do. `open` gives an empty one; `again` opens the same one after it was closed. */
export const kmsConformance = (name: string, open: () => Promise<{ readonly kms: Kms; readonly again: () => Promise<Kms> }>): void => {
  describe(`kms: ${name}`, () => {
    let kms: Kms
    let again: () => Promise<Kms>
    beforeEach(async () => {
      ;({ kms, again } = await open())
    })
    afterEach(async () => {
      await kms.close()
    })
    const isSigned = (spki: Uint8Array | null, data: Uint8Array, signature: Uint8Array | undefined): boolean =>
      verify('sha256', data, createPublicKey({ key: Buffer.from(spki ?? []), format: 'der', type: 'spki' }), signature ?? new Uint8Array())

    test('create is idempotent per name, and a name has one purpose', async () => {
      const made = await kms.create('root', 'root-ca')
      expect(made).toMatchObject({ name: 'root', purpose: 'root-ca', uses: 0 })
      expect(await kms.create('root', 'root-ca')).toEqual(made)
      await expect(kms.create('root', 'issuing-ca')).rejects.toMatchObject({ code: 'forbidden' })
      expect(await kms.describe('root')).toEqual(made)
      expect(await kms.describe('other')).toBeUndefined()
      expect(createPublicKey({ key: Buffer.from(made.spki ?? []), format: 'der', type: 'spki' }).asymmetricKeyDetails).toMatchObject({
        namedCurve: 'prime256v1',
      })
      expect((await kms.create('kek', 'kek')).spki).toBeNull()
      expect((await kms.list()).map((key) => key.name)).toEqual(['kek', 'root'])
    })

    test.each(['', '../x', 'A', 'a/b', '-a', 'a'.repeat(65)])('a key is not named %j', async (key) => {
      await expect(kms.create(key, 'kek')).rejects.toMatchObject({ code: 'malformed' })
    })

    test('signs a batch in its order, and counts', async () => {
      const [a, b] = [await kms.create('a', 'delivery-signing'), await kms.create('b', 'audit-signing')]
      const signatures = await kms.sign([
        { key: 'a', purpose: 'delivery-signing', data: bytes('one') },
        { key: 'b', purpose: 'audit-signing', data: bytes('two') },
        { key: 'a', purpose: 'delivery-signing', data: bytes('three') },
      ])
      expect(signatures).toHaveLength(3)
      expect(isSigned(a.spki, bytes('one'), signatures[0])).toBe(true)
      expect(isSigned(b.spki, bytes('two'), signatures[1])).toBe(true)
      expect(isSigned(a.spki, bytes('three'), signatures[2])).toBe(true)
      expect((await kms.list()).map(({ uses }) => uses)).toEqual([2, 1])
      expect(await kms.sign([])).toEqual([])
    })

    test('a key signs for its purpose only; a refused batch signs nothing', async () => {
      await kms.create('a', 'delivery-signing')
      await kms.create('kek', 'kek')
      const good = { key: 'a', purpose: 'delivery-signing', data: bytes('x') } as const
      await expect(kms.sign([good, { ...good, purpose: 'root-ca' }])).rejects.toMatchObject({ code: 'forbidden', reason: 'kms.purpose' })
      await expect(kms.sign([good, { ...good, key: 'kek', purpose: 'kek' }])).rejects.toMatchObject({ code: 'forbidden' })
      await expect(kms.sign([good, { ...good, key: 'none' }])).rejects.toMatchObject({ code: 'not-found' })
      expect((await kms.describe('a'))?.uses).toBe(0)
    })

    test('wraps and unwraps with its context, in order', async () => {
      await kms.create('kek', 'kek')
      const item = (text: string, context: string) => ({ key: 'kek', plaintext: new Secret(bytes(text)), context: bytes(context) })
      const [one, two] = (await kms.wrap([item('first', 'a'), item('', 'b')])) as [Uint8Array, Uint8Array]
      const opened = await kms.unwrap([
        { key: 'kek', wrapped: two, context: bytes('b') },
        { key: 'kek', wrapped: one, context: bytes('a') },
      ])
      expect(opened.map((secret) => Buffer.from(secret.bytes()).toString())).toEqual(['', 'first'])
      expect(Buffer.from(one).includes('first')).toBe(false)
      const [same] = (await kms.wrap([item('first', 'a')])) as [Uint8Array]
      expect(Buffer.compare(same, one)).not.toBe(0)
    })

    test('a wrap opens with its key, its context and unchanged only', async () => {
      await kms.create('kek', 'kek')
      await kms.create('kek-2', 'kek')
      await kms.create('a', 'audit-signing')
      const context = bytes('here')
      const [wrapped] = (await kms.wrap([{ key: 'kek', plaintext: new Secret(bytes('secret')), context }])) as [Uint8Array]
      const refused = { code: 'internal', reason: 'kms.unwrap' }
      await expect(kms.unwrap([{ key: 'kek-2', wrapped, context }])).rejects.toMatchObject(refused)
      await expect(kms.unwrap([{ key: 'kek', wrapped, context: bytes('there') }])).rejects.toMatchObject(refused)
      for (let at = 0; at < wrapped.length; at++) {
        const changed = wrapped.map((byte, index) => (index === at ? byte ^ 1 : byte))
        await expect(kms.unwrap([{ key: 'kek', wrapped: changed, context }])).rejects.toMatchObject(refused)
      }
      for (const length of [0, 1, 28, wrapped.length - 1])
        await expect(kms.unwrap([{ key: 'kek', wrapped: wrapped.subarray(0, length), context }])).rejects.toMatchObject(refused)
      await expect(kms.unwrap([{ key: 'a', wrapped, context }])).rejects.toMatchObject({ code: 'forbidden' })
      await expect(kms.wrap([{ key: 'a', plaintext: new Secret(context), context }])).rejects.toMatchObject({ code: 'forbidden' })
    })

    test('keys and their counts are there again after closing; closed means unavailable', async () => {
      const made = await kms.create('a', 'delivery-signing')
      await kms.create('kek', 'kek')
      await kms.sign([{ key: 'a', purpose: 'delivery-signing', data: bytes('x') }])
      const [wrapped] = (await kms.wrap([{ key: 'kek', plaintext: new Secret(bytes('s')), context: bytes('c') }])) as [Uint8Array]
      await kms.close()
      await expect(kms.sign([{ key: 'a', purpose: 'delivery-signing', data: bytes('x') }])).rejects.toMatchObject({ code: 'unavailable' })
      await expect(kms.create('b', 'kek')).rejects.toMatchObject({ code: 'unavailable' })
      kms = await again()
      expect(await kms.describe('a')).toEqual({ ...made, uses: 1 })
      const [opened] = await kms.unwrap([{ key: 'kek', wrapped, context: bytes('c') }])
      expect(opened?.equals(new Secret(bytes('s')))).toBe(true)
    })

    test('a destroyed key is gone for good', async () => {
      await kms.create('kek', 'kek')
      const [wrapped] = (await kms.wrap([{ key: 'kek', plaintext: new Secret(bytes('s')), context: bytes('c') }])) as [Uint8Array]
      await kms.destroy('kek')
      await expect(kms.destroy('kek')).rejects.toMatchObject({ code: 'not-found' })
      expect(await kms.list()).toEqual([])
      await kms.close()
      kms = await again()
      expect(await kms.describe('kek')).toBeUndefined()
      await kms.create('kek', 'kek')
      await expect(kms.unwrap([{ key: 'kek', wrapped, context: bytes('c') }])).rejects.toMatchObject({ code: 'internal' })
    })
  })
}
