import { randomBytes } from 'node:crypto'
import { describe, expect, test } from 'vitest'
import { Epoch, KeyId } from '@fleetkey/protocol/ids.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'
import { checkValueOf, openCell, sealCell } from './at-rest.ts'
import { desiredEpochs, differences, type Reported } from './entitlement.ts'
import type { Holding, KeyEpoch, KeyState, ManagedKey } from './key.ts'
import { moved, transitions } from './states.ts'

const states: readonly KeyState[] = ['pre-activation', 'active', 'suspended', 'deactivated', 'compromised', 'destroyed']
const epochOf = (number: number, state: KeyState, of: Partial<KeyEpoch> = {}): KeyEpoch =>
  ({
    id: `telemetry/${number}`,
    version: 1,
    key: KeyId.parse('telemetry'),
    epoch: Epoch.parse(number),
    state,
    material: state === 'destroyed' ? null : randomBytes(60),
    dataKey: 'd1',
    checkValue: '00',
    createdAt: 0,
    activatedAt: null,
    deactivatedAt: null,
    destroyedAt: null,
    ...of,
  }) as unknown as KeyEpoch

describe('states of an epoch (SP 800-57 Part 1, §7)', () => {
  const all = states.flatMap((from) => states.map((to) => [from, to] as const))
  test.each(all)('%s to %s', (from, to) => {
    const epoch = epochOf(1, from)
    if (!transitions[from].includes(to)) {
      expect(() => moved(epoch, to, 9)).toThrow(Problem)
      return
    }
    const after = moved(epoch, to, 9)
    expect(after.state).toBe(to)
    expect(after.material === null).toBe(to === 'destroyed')
  })
  test('nothing leaves destroyed, nothing becomes active again once it was deactivated', () => {
    expect(transitions.destroyed).toEqual([])
    expect(transitions.deactivated).not.toContain('active')
    expect(transitions.compromised).not.toContain('active')
  })
  test('the time of activation is the first one', () => expect(moved(epochOf(1, 'suspended', { activatedAt: 3 }), 'active', 9).activatedAt).toBe(3))
})

describe('what a device should hold', () => {
  const key = { id: KeyId.parse('telemetry'), current: 2, latest: 3, recipientUsage: 100, protection: 'sealed', algorithm: 'A256GCM' } as unknown as ManagedKey
  const epochs = [epochOf(1, 'deactivated', { deactivatedAt: 50 }), epochOf(2, 'active'), epochOf(3, 'pre-activation')]
  const holding = (epoch: number, stage: Holding['stage']): Holding => ({ id: `d/telemetry/${epoch}`, key: key.id, epoch, stage }) as unknown as Holding
  const at = (now: number, next = false) => desiredEpochs(key, epochs, next, now)

  test.each([
    ['the old one while it can be read', 149, false, ['1 readable', '2 active']],
    ['not after', 150, false, ['2 active']],
    ['the next one once its wave is open', 150, true, ['2 active', '3 install']],
  ] as const)('%s', (_, now, next, want) => expect(at(now, next).epochs.map(({ epoch, as }) => `${epoch.epoch} ${as}`)).toEqual(want))

  test('nothing that is destroyed', () => expect(desiredEpochs(key, [epochOf(2, 'destroyed')], true, 0).epochs).toEqual([]))

  const said = (...of: [number, Reported['stage']][]): Reported[] => of.map(([epoch, stage]) => ({ key: 'telemetry', epoch, stage }))
  const told = (of: ReturnType<typeof differences>): string[] =>
    of.map((one) =>
      one.do === 'deliver'
        ? `deliver ${one.epoch.epoch} ${one.as}`
        : one.do === 'activate'
          ? `activate ${one.holding.epoch}`
          : `retire below ${String(one.below)}`,
    )

  const cases: readonly [string, Holding[], Reported[] | null, string[]][] = [
    ['a new device gets the epoch in use', [], said(), ['deliver 2 active']],
    ['delivered and not acknowledged: again', [holding(2, 'delivered')], said(), ['deliver 2 active']],
    ['delivered, the device has it, its statement was lost: again', [holding(2, 'delivered')], said([2, 'installed']), ['deliver 2 active']],
    ['installed and it is in use now: activate', [holding(2, 'installed')], said([2, 'installed']), ['activate 2']],
    ['activated by proof, but the device says it is not: activate', [holding(2, 'active')], said([2, 'installed']), ['activate 2']],
    ['all is as it should be', [holding(2, 'active')], said([2, 'active']), []],
    ['the same, not asked', [holding(2, 'active')], null, []],
    ['it has lost what it had proven: again', [holding(2, 'active')], said(), ['deliver 2 active']],
    ['an old epoch is left behind: retire', [holding(1, 'active'), holding(2, 'active')], said([1, 'active'], [2, 'active']), ['retire below 2']],
    ['not before the new one is proven', [holding(1, 'active'), holding(2, 'installed')], said([1, 'active'], [2, 'installed']), ['activate 2']],
    [
      'it says that it holds an old one which the server has as retired',
      [holding(1, 'retired'), holding(2, 'active')],
      said([1, 'active'], [2, 'active']),
      ['retire below 2'],
    ],
  ]
  test.each(cases)('%s', (_, proven, reported, want) => expect(told(differences([at(150)], proven, reported))).toEqual(want))

  test('a key whose grant is gone is erased whole', () => {
    expect(told(differences([], [holding(2, 'active')], null))).toEqual(['retire below null'])
    expect(told(differences([], [], said([2, 'active'])))).toEqual(['retire below null'])
    expect(told(differences([], [holding(2, 'retired')], said()))).toEqual([])
  })
})

describe('key material at rest', () => {
  const key = new Secret(randomBytes(32))
  const place = { tenant: 'plant', table: 'epoch', row: 'telemetry/1', column: 'material' }
  const material = new Secret(randomBytes(32))
  const cell = sealCell(key, place, material, randomBytes(12))

  test('opens where it was put', () => expect(openCell(key, place, cell).equals(material)).toBe(true))
  test.each(['tenant', 'table', 'row', 'column'] as const)('not in another %s', (field) =>
    expect(() => openCell(key, { ...place, [field]: 'x' }, cell)).toThrow(Problem),
  )
  test('not under another key', () => expect(() => openCell(new Secret(randomBytes(32)), place, cell)).toThrow(Problem))
  test('no changed byte, no cut', () => {
    for (let at = 0; at < cell.length; at++) {
      expect(() =>
        openCell(
          key,
          place,
          cell.map((byte, index) => (index === at ? byte ^ 1 : byte)),
        ),
      ).toThrow()
      expect(() => openCell(key, place, cell.subarray(0, at))).toThrow()
    }
  })
  test('the check value tells keys apart and is not the key', () => {
    expect(checkValueOf(material)).toMatch(/^[0-9a-f]{16}$/)
    expect(checkValueOf(material)).not.toBe(checkValueOf(key))
  })
})
