import { isPoint, type CurveName } from '@fleetkey/protocol/curves.ts'
import { curve } from '@fleetkey/tpm2/constants.ts'
import type { EccPublic } from '@fleetkey/tpm2/structures.ts'

const names: ReadonlyMap<number, CurveName> = new Map([
  [curve.p256, 'p256'],
  [curve.p384, 'p384'],
])

/** Whether the point of a P-256 or P-384 key lies on its curve. */
export const isOnCurve = (key: Pick<EccPublic, 'curve' | 'x' | 'y'>): boolean => {
  const name = names.get(key.curve)
  return name !== undefined && isPoint(name, key)
}
