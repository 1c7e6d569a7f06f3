import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { manifestCsv, manifestJson } from '@fleetkey/firmware-sim/factory/manifest.ts'
import { importBatch } from '@fleetkey/server/flows/import-batch.ts'
import { importRelease } from '@fleetkey/server/flows/import-release.ts'
import { addStation, removeStation } from '@fleetkey/server/flows/station.ts'
import { operator, station, testContext, type TestContext } from './harness.ts'

const ek = (n: number): string => n.toString(16).padStart(64, '0')
const line = station()
let ctx: TestContext

beforeEach(async () => {
  ctx = await testContext()
  await addStation(ctx, operator(), line)
})
afterEach(async () => await ctx.close())

const json = (rows: readonly unknown[], more: object = {}): string =>
  JSON.stringify({ format: 'fleetkey/batch/1', batch: 'b1', model: 'm1', station: line.id, rows, ...more })
const good = [
  { serial: 'SN-1', ek: ek(1) },
  { serial: 'SN-2', ek: ek(2), device: 'pump' },
]

describe('batch manifests', () => {
  test('JSON and CSV give the same rows', async () => {
    expect(await importBatch(ctx, operator(), { ...line.signed(json(good)), format: 'json' })).toEqual({ batch: 'b1', rows: 2 })
    const csv = `serial,ek,model,device\r\nSN-3,${ek(3)},m1,\r\nSN-4,${ek(4)},m2,valve\r\n`
    expect(await importBatch(ctx, operator(), { ...line.signed(csv), format: 'csv', batch: 'b2' })).toEqual({ batch: 'b2', rows: 2 })
    const devices = await ctx.store.find('device', { limit: 10 })
    expect(devices.map(({ id, state, serial, model, batch }) => [id, state, serial, model, batch])).toEqual([
      ['pump', 'registered', 'SN-2', 'm1', 'b1'],
      ['sn-1', 'registered', 'SN-1', 'm1', 'b1'],
      ['sn-3', 'registered', 'SN-3', 'm1', 'b2'],
      ['valve', 'registered', 'SN-4', 'm2', 'b2'],
    ])
    expect((await ctx.store.get('manifest', ek(4)))?.device).toBe('valve')
  })

  test('a claim window: of manifest and operator the earlier one', async () => {
    const [early, late] = ['2027-02-01T00:00:00Z', '2027-03-01T00:00:00Z']
    const rows = (serial: string, at: number) => [{ serial, ek: ek(at) }]
    const cases: readonly (readonly [string, object, number | undefined, number | null])[] = [
      ['w1', {}, undefined, null],
      ['w2', { claimUntil: early }, undefined, Date.parse(early)],
      ['w3', {}, Date.parse(late), Date.parse(late)],
      ['w4', { claimUntil: early }, Date.parse(late), Date.parse(early)],
      ['w5', { claimUntil: late }, Date.parse(early), Date.parse(early)],
    ]
    for (const [at, [batch, more, claimUntil, want]] of cases.entries()) {
      await importBatch(ctx, operator(), { ...line.signed(json(rows(batch, at + 1), { batch, ...more })), format: 'json', claimUntil })
      expect((await ctx.store.get('batch', batch))?.claimUntil, batch).toBe(want)
    }
    expect((await ctx.entries()).at(-1)?.detail).toMatch(/to be claimed until 2027-02-01T00:00:00.000Z$/)
    const wrong = importBatch(ctx, operator(), { ...line.signed(json(rows('w6', 9), { batch: 'w6', claimUntil: 'soon' })), format: 'json' })
    await expect(wrong).rejects.toMatchObject({ code: 'malformed' })
  })

  test('boards of three kinds: JSON and CSV give the same, each by its own key into the manifest', async () => {
    const rows = [{ serial: 'A', ek: ek(1) }, { serial: 'B', idevid: ek(2) }, { serial: 'C' }]
    await importBatch(ctx, operator(), { ...line.signed(json(rows)), format: 'json' })
    const csv = `serial,ek,model,device,idevid\nD,${ek(3)},m1,,\nE,,m1,,${ek(4)}\nF,,m1,,\n`
    await importBatch(ctx, operator(), { ...line.signed(csv), format: 'csv', batch: 'b2' })
    const entries = await ctx.store.find('manifest', { limit: 10 })
    expect(entries.map(({ id, serial }) => [id, serial]).toSorted(([, one = ''], [, other = '']) => (one < other ? -1 : 1))).toEqual([
      [ek(1), 'A'],
      [`idevid/${ek(2)}`, 'B'],
      ['serial/C', 'C'],
      [ek(3), 'D'],
      [`idevid/${ek(4)}`, 'E'],
      ['serial/F', 'F'],
    ])
  })

  test("the simulator's factory: the same devices from its CSV as from its JSON", async () => {
    const boards = [1, 2].map((n) => ({ serial: `GW-${n}`, ek: new Uint8Array(32).fill(n) }))
    const ids = async (): Promise<string[]> => (await ctx.store.find('device', { limit: 10 })).map(({ id, serial, model }) => `${id} ${serial} ${model}`)
    await importBatch(ctx, operator(), { ...line.signed(manifestCsv({ model: 'm1' }, boards)), format: 'csv', batch: 'b1' })
    const fromCsv = await ids()
    await ctx.close()
    ctx = await testContext()
    await addStation(ctx, operator(), line)
    await importBatch(ctx, operator(), { ...line.signed(manifestJson({ batch: 'b1', model: 'm1', station: line.id }, boards)), format: 'json' })
    expect(await ids()).toEqual(fromCsv)
    expect(fromCsv).toEqual(['gw-1 GW-1 m1', 'gw-2 GW-2 m1'])
  })

  const csvOf = (...rows: string[]) => ({ ...line.signed(['serial,ek,model,device', ...rows, ''].join('\n')), format: 'csv' as const, batch: 'b1' })
  const jsonOf = (rows: readonly unknown[], more: object = {}) => ({ ...line.signed(json(rows, more)), format: 'json' as const })
  const refused: readonly (readonly [string, () => Parameters<typeof importBatch>[2], string, RegExp])[] = [
    ['doubled serial', () => jsonOf([...good, { serial: 'SN-1', ek: ek(3), device: 'x' }]), 'malformed', /^row 3: serial SN-1 already stands in row 1/],
    ['doubled EK', () => csvOf(`A,${ek(1)},m,`, `B,${ek(1)},m,`), 'malformed', /^row 2: ek .* already stands in row 1/],
    ['device id collision', () => csvOf(`A,${ek(1)},m,`, `B,${ek(2)},m,a`), 'malformed', /^row 2: device a already stands in row 1/],
    ['serials that differ in case only', () => csvOf(`A,${ek(1)},m,`, `a,${ek(2)},m,`), 'malformed', /^row 2: device a /],
    [
      'doubled IDevID',
      () =>
        jsonOf([
          { serial: 'A', idevid: ek(1) },
          { serial: 'B', idevid: ek(1) },
        ]),
      'malformed',
      /^row 2: idevid .* already stands in row 1/,
    ],
    ['EK and IDevID', () => jsonOf([{ serial: 'A', ek: ek(1), idevid: ek(2) }]), 'malformed', /^row 1: ek and idevid: a board is known by one of them/],
    [
      'a field too few for its header',
      () => ({ ...line.signed(`serial,ek,model,device,idevid\nA,${ek(1)},m,\n`), format: 'csv' as const, batch: 'b1' }),
      'malformed',
      /^row 1: 5 fields expected, 4 found/,
    ],
    ['malformed EK', () => csvOf(`A,${ek(1)},m,`, `B,${ek(2).toUpperCase().replace('0', 'G')},m,`), 'malformed', /^row 2: ek/],
    ['a field too many', () => csvOf(`A,${ek(1)},m,,`), 'malformed', /^row 1: 4 fields/],
    ['an empty line', () => csvOf(`A,${ek(1)},m,`, '', `B,${ek(2)},m,`), 'malformed', /^row 2:/],
    ['a serial that makes no device id', () => csvOf(`A.B,${ek(1)},m,`), 'malformed', /^row 1: serial A\.B makes no device id/],
    ['a device id kept for enrolment', () => csvOf(`A,${ek(1)},m,e-1`), 'malformed', /^row 1: device/],
    ['an unknown field', () => jsonOf([{ ...good[0], extra: 1 }]), 'malformed', /^row 1:/],
    ['no rows', () => jsonOf([]), 'malformed', /rows/],
    ['another header', () => ({ ...line.signed(`serial,ek\nA,${ek(1)}\n`), format: 'csv', batch: 'b1' }), 'malformed', /first line/],
    ['CSV without a batch name', () => ({ ...line.signed(`serial,ek,model,device\nA,${ek(1)},m,\n`), format: 'csv' }), 'malformed', /name of its batch/],
    ['not JSON', () => ({ ...line.signed('{'), format: 'json' }), 'malformed', /not JSON/],
    ['not UTF-8', () => ({ ...line.signed(Uint8Array.of(0xff)), format: 'json' }), 'malformed', /UTF-8/],
    ['another station named', () => jsonOf(good, { station: 'line-2' }), 'malformed', /station line-2/],
    ['wrong signature', () => ({ ...line.signed(json(good)), content: new TextEncoder().encode(json([])), format: 'json' }), 'forbidden', /not signed/],
    ['signature of another station', () => ({ ...station().signed(json(good)), format: 'json' }), 'forbidden', /not signed/],
    ['unknown station', () => ({ ...station('nobody').signed(json(good)), format: 'json' }), 'forbidden', /no station/],
    ['too large', () => ({ ...line.signed(new Uint8Array((16 << 20) + 1)), format: 'json' }), 'malformed', /more than/],
  ]
  test.each(refused)('%s: nothing is imported', async (_name, input, code, detail) => {
    await expect(importBatch(ctx, operator(), input())).rejects.toMatchObject({ code, message: expect.stringMatching(detail) })
    expect([await ctx.store.count('device'), await ctx.store.count('manifest'), await ctx.store.count('batch')]).toEqual([0, 0, 0])
    expect((await ctx.entries()).at(-1)).toMatchObject({ action: 'batch.import', outcome: 'refused', code })
  })

  test('what an earlier batch holds is refused by row', async () => {
    await importBatch(ctx, operator(), jsonOf(good))
    const again = async (row: object) => await importBatch(ctx, operator(), jsonOf([{ serial: 'NEW', ek: ek(9) }, row], { batch: 'b2' }))
    await expect(again({ serial: 'SN-1', ek: ek(5), device: 'new-2' })).rejects.toMatchObject({
      code: 'conflict',
      message: expect.stringMatching(/^row 2: serial/),
    })
    await expect(again({ serial: 'X', ek: ek(1) })).rejects.toMatchObject({ code: 'conflict', message: expect.stringMatching(/^row 2: ek/) })
    await expect(again({ serial: 'X', ek: ek(5), device: 'pump' })).rejects.toMatchObject({
      code: 'conflict',
      message: expect.stringMatching(/^row 2: device/),
    })
    await expect(importBatch(ctx, operator(), jsonOf([{ serial: 'Q', ek: ek(7) }]))).rejects.toMatchObject({ code: 'conflict' })
    expect(await ctx.store.count('device')).toBe(2)
  })

  test('10,000 rows in one commit', async () => {
    const rows = Array.from({ length: 10_000 }, (_, at) => ({ serial: `S${at}`, ek: ek(at + 1) }))
    expect(await importBatch(ctx, operator(), jsonOf(rows))).toEqual({ batch: 'b1', rows: 10_000 })
    expect(await ctx.store.count('device')).toBe(10_000)
    expect((await ctx.entries()).filter(({ action }) => action === 'batch.import')).toHaveLength(1)
  })

  test('an auditor may not, a removed station does not count', async () => {
    await expect(importBatch(ctx, operator('auditor'), jsonOf(good))).rejects.toMatchObject({ code: 'forbidden' })
    await removeStation(ctx, operator(), line.id)
    await expect(importBatch(ctx, operator(), jsonOf(good))).rejects.toMatchObject({ code: 'forbidden' })
  })
})

describe('reference values', () => {
  const values = { format: 'fleetkey/release/1', model: 'm1', name: '1.0.0', number: 1, debug: false, pcrs: { '0': ek(1), '11': ek(2) } }
  test('a signed release is imported once', async () => {
    expect(await importRelease(ctx, operator(), line.signed(JSON.stringify(values)))).toEqual({ id: 'm1/1.0.0' })
    expect(await ctx.store.get('release', 'm1/1.0.0')).toMatchObject({ model: 'm1', number: 1, pcrs: values.pcrs })
    await expect(importRelease(ctx, operator(), line.signed(JSON.stringify(values)))).rejects.toMatchObject({ code: 'conflict' })
  })
  test.each([
    ['PCR 24', { ...values, pcrs: { '24': ek(1) } }],
    ['a short value', { ...values, pcrs: { '0': 'ab' } }],
    ['no PCR', { ...values, pcrs: {} }],
    ['an unknown field', { ...values, more: 1 }],
    ['no word on debug', { ...values, debug: undefined }],
    ['a negative number', { ...values, number: -1 }],
    ['a name that is a path', { ...values, name: '../1' }],
  ])('%s is refused', async (_name, content) => {
    await expect(importRelease(ctx, operator(), line.signed(JSON.stringify(content)))).rejects.toMatchObject({ code: 'malformed' })
    expect(await ctx.store.count('release')).toBe(0)
  })
})
